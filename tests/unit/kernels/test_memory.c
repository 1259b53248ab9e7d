/* How much memory there is, read from folders that stand for /proc and /sys/fs/cgroup. */
#include "kernels/fixture.h"

#include <sys/stat.h>
#include <unistd.h>

#include "../../../kernels/cpu/memory.h"

static char root[64];

static void put(const char *path, const char *text)
{
    char full[512], *slash = full + strlen(root) + 1;
    snprintf(full, sizeof full, "%s/%s", root, path);
    while ((slash = strchr(slash, '/')) != NULL) {
        *slash = '\0';
        mkdir(full, 0700);
        *slash++ = '/';
    }
    FILE *file = fopen(full, "we");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static int new_root(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/pml-test-memory-XXXXXX");
    if (mkdtemp(root) == NULL)
        return -1;
    put("proc/meminfo",
        "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\n");
    put("cgroup/unused", "");
    return 0;
}

static int remove_root(void **state)
{
    (void)state;
    char command[128];
    snprintf(command, sizeof command, "rm -r %s", root);
    return system(command);
}

static void expect_numbers(size_t total, size_t free_bytes)
{
    char proc[128], cgroup[128];
    snprintf(proc, sizeof proc, "%s/proc", root);
    snprintf(cgroup, sizeof cgroup, "%s/cgroup", root);
    pmli_memory memory;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_memory_read(proc, cgroup, &memory, &err), PML_OK);
    assert_int_equal(memory.total, total);
    assert_int_equal(memory.free, free_bytes);
}

static void test_without_groups(void **state)
{
    (void)state;
    expect_numbers(1000 * 1024, 600 * 1024);
    put("proc/self/cgroup", "0::/\n");
    expect_numbers(1000 * 1024, 600 * 1024);
    put("proc/self/cgroup", "nonsense\n5:cpu:/x\n");
    expect_numbers(1000 * 1024, 600 * 1024);
}

static void test_version_2(void **state)
{
    (void)state;
    put("proc/self/cgroup", "0::/a/b\n");
    put("cgroup/a/b/memory.max", "max\n");
    put("cgroup/a/b/memory.current", "5000\n");
    expect_numbers(1000 * 1024, 600 * 1024);
    put("cgroup/a/b/memory.max", "400000\n");
    put("cgroup/a/b/memory.current", "150000\n");
    expect_numbers(400000, 250000);
    put("cgroup/a/b/memory.stat", "anon 7\ninactive_file 50000\nactive_file 3\n"); /* given back */
    expect_numbers(400000, 300000);
    put("cgroup/a/memory.max", "300000\n"); /* the group above is tighter */
    put("cgroup/a/memory.current", "299000\n");
    expect_numbers(300000, 1000);
    put("cgroup/a/memory.current", "310000\n"); /* over it for a moment */
    expect_numbers(300000, 0);
}

/* In a container the group's name is the host's; its limit lies at the root of what is mounted. */
static void test_container(void **state)
{
    (void)state;
    put("proc/self/cgroup", "0::/docker/0123\n");
    put("cgroup/memory.max", "500000\n");
    put("cgroup/memory.current", "100000\n");
    expect_numbers(500000, 400000);
}

static void test_version_1(void **state)
{
    (void)state;
    put("proc/self/cgroup", "3:cpu,cpuacct:/x\n2:memory:/y\n1:name=systemd:/\n");
    put("cgroup/memory/y/memory.limit_in_bytes", "9223372036854771712\n"); /* none */
    put("cgroup/memory/y/memory.usage_in_bytes", "1000\n");
    expect_numbers(1000 * 1024, 600 * 1024);
    put("cgroup/memory/y/memory.limit_in_bytes", "200000\n");
    put("cgroup/memory/y/memory.usage_in_bytes", "150000\n");
    put("cgroup/memory/y/memory.stat", "cache 1\ninactive_file 5\ntotal_inactive_file 30000\n");
    expect_numbers(200000, 80000);
}

static void test_no_meminfo(void **state)
{
    (void)state;
    put("proc/meminfo", "MemTotal: 5 kB\n");
    char proc[128];
    snprintf(proc, sizeof proc, "%s/proc", root);
    pmli_memory memory;
    pml_error err = PML_ERROR_INIT;
    assert_int_equal(pmli_memory_read(proc, "/nowhere", &memory, &err), PML_IO);
    assert_non_null(strstr(err.message, "meminfo"));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(test_without_groups, new_root, remove_root),
        cmocka_unit_test_setup_teardown(test_version_2, new_root, remove_root),
        cmocka_unit_test_setup_teardown(test_container, new_root, remove_root),
        cmocka_unit_test_setup_teardown(test_version_1, new_root, remove_root),
        cmocka_unit_test_setup_teardown(test_no_meminfo, new_root, remove_root),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}

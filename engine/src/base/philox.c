#include "pml/base/philox.h"

pml_philox pml_philox_at(uint64_t seed, uint64_t step, uint32_t purpose, uint64_t index)
{
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    uint32_t c0 = (uint32_t)index, c1 = (uint32_t)(index >> 32);
    uint32_t c2 = (uint32_t)step, c3 = purpose;
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53U * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57U * c2;
        uint32_t next0 = (uint32_t)(p1 >> 32) ^ c1 ^ key0;
        uint32_t next2 = (uint32_t)(p0 >> 32) ^ c3 ^ key1;
        c0 = next0;
        c1 = (uint32_t)p1;
        c2 = next2;
        c3 = (uint32_t)p0;
        key0 += 0x9E3779B9U; /* golden ratio */
        key1 += 0xBB67AE85U; /* sqrt(3) - 1  */
    }
    return (pml_philox){{c0, c1, c2, c3}};
}

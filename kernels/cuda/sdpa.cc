// cuDNN's attention through cudnn-frontend. No exception leaves this file: what goes wrong inside
// becomes a status.
#include "sdpa.h"

#include <cudnn_frontend.h>
#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <string>
#include <unordered_map>

extern "C" {
#include "find_library.h"
#include "sdpa_plans.h"
}

namespace fe = cudnn_frontend;

namespace cudnn_frontend
{
void *cudnn_dlhandle = nullptr;
}

namespace
{

typedef std::shared_ptr<fe::graph::Graph> Graph;
typedef std::shared_ptr<fe::graph::Tensor_attributes> Tensor;

enum Name : int64_t {
    Q = 1,
    K,
    V,
    O,
    STATS,
    DOUT,
    DQ,
    DK,
    DV,
    LENGTHS_Q,
    LENGTHS_K,
    AT_Q,
    AT_K,
    AT_V,
    AT_O,
    AT_DOUT,
    AT_DQ,
    AT_DK,
    AT_DV,
    AT_STATS
};

// One attention as a cuDNN graph: a batch of `slots` documents, heads, `longest` rows, head_dim;
// where a document begins says its ragged offset, unless all are equal.
class Builder
{
  public:
    explicit Builder(const pmli_sdpa_shape &shape) : s(shape), graph(new fe::graph::Graph)
    {
        const auto io = s.dtype == PML_BF16 ? fe::DataType_t::BFLOAT16 : fe::DataType_t::HALF;
        graph->set_io_data_type(io)
            .set_intermediate_data_type(fe::DataType_t::FLOAT)
            .set_compute_data_type(fe::DataType_t::FLOAT);
    }

    Graph forward()
    {
        Tensor q = matrix(Q, s.heads, s.ld_q, AT_Q), k = matrix(K, s.kv_heads, s.ld_k, AT_K);
        Tensor v = matrix(V, s.kv_heads, s.ld_v, AT_V);
        auto options = fe::graph::SDPA_attributes()
                           .set_name("attention")
                           .set_generate_stats(true)
                           .set_attn_scale(s.scale);
        masked(options);
        auto [o, stats] = graph->sdpa(q, k, v, options);
        result(o, O, s.heads, s.ld_o, AT_O);
        lay_stats(stats);
        stats->set_output(true);
        return graph;
    }

    Graph backward()
    {
        Tensor q = matrix(Q, s.heads, s.ld_q, AT_Q), k = matrix(K, s.kv_heads, s.ld_k, AT_K);
        Tensor v = matrix(V, s.kv_heads, s.ld_v, AT_V), o = matrix(O, s.heads, s.ld_o, AT_O);
        Tensor dout = matrix(DOUT, s.heads, s.ld_dout, AT_DOUT);
        Tensor stats = graph->tensor(fe::graph::Tensor_attributes().set_name("stats"));
        lay_stats(stats);
        auto options = fe::graph::SDPA_backward_attributes()
                           .set_name("attention backward")
                           .set_attn_scale(s.scale);
        masked(options);
        auto [dq, dk, dv] = graph->sdpa_backward(q, k, v, o, dout, stats, options);
        result(dq, DQ, s.heads, s.ld_dq, AT_DQ);
        result(dk, DK, s.kv_heads, s.ld_dk, AT_DK);
        result(dv, DV, s.kv_heads, s.ld_dv, AT_DV);
        return graph;
    }

  private:
    // What a query sees: forward and backward alike.
    template <typename Options> void masked(Options &options)
    {
        options.set_causal_mask(true);
        if (s.window > 0)
            options.set_diagonal_band_left_bound((int)s.window);
        if (!s.equal)
            options.set_padding_mask(true)
                .set_seq_len_q(lengths(LENGTHS_Q))
                .set_seq_len_kv(lengths(LENGTHS_K));
    }

    Tensor matrix(Name name, int64_t heads, int64_t ld, Name at)
    {
        Tensor t = graph->tensor(fe::graph::Tensor_attributes()
                                     .set_uid(name)
                                     .set_name("tensor " + std::to_string(name))
                                     .set_dim({s.slots, heads, s.longest, s.head_dim})
                                     .set_stride({s.longest * ld, s.head_dim, ld, 1}));
        if (!s.equal)
            t->set_ragged_offset(offsets(at));
        return t;
    }

    void result(const Tensor &t, Name name, int64_t heads, int64_t ld, Name at)
    {
        t->set_output(true)
            .set_uid(name)
            .set_dim({s.slots, heads, s.longest, s.head_dim})
            .set_stride({s.longest * ld, s.head_dim, ld, 1});
        if (!s.equal)
            t->set_ragged_offset(offsets(at));
    }

    void lay_stats(const Tensor &t)
    {
        t->set_uid(STATS)
            .set_data_type(fe::DataType_t::FLOAT)
            .set_dim({s.slots, s.heads, s.longest, 1});
        if (s.equal)
            t->set_stride({s.backward ? s.heads * s.longest : s.longest, s.ld_stats, 1, 1});
        else
            t->set_stride({s.longest * s.heads, 1, s.heads, 1})
                .set_ragged_offset(offsets(AT_STATS));
    }

    // Of a later call they begin within those of all.
    Tensor vector(Name name, int64_t n, fe::DataType_t type, int64_t alignment)
    {
        return graph->tensor(fe::graph::Tensor_attributes()
                                 .set_uid(name)
                                 .set_name("vector " + std::to_string(name))
                                 .set_dim({n, 1, 1, 1})
                                 .set_stride({1, 1, 1, 1})
                                 .set_alignment(alignment)
                                 .set_data_type(type));
    }

    Tensor lengths(Name name)
    {
        return vector(name, s.slots, fe::DataType_t::INT32, sizeof(int32_t));
    }
    Tensor offsets(Name name)
    {
        return vector(name, s.slots + 1, fe::DataType_t::INT64, sizeof(int64_t));
    }

    const pmli_sdpa_shape s;
    Graph graph;
};

pml_status failed(pml_error *err, const char *what, const std::string &why)
{
    return PML_FAIL(err, PML_INTERNAL, "cuDNN, %s: %s", what, why.c_str());
}

} // namespace

// One handle, which serves who has the plans: a second one would be 10 MiB of the device.
struct pmli_sdpa {
    cudnnHandle_t handle = nullptr;
    pmli_sdpa_plans *plans = nullptr;
};

// NVIDIA's engines need the run-time compiler beside cuDNN; without it no plan is built and the
// backend's own kernels serve.
static fe::error_t try_to_build(const pmli_sdpa *sdpa, pmli_sdpa_plan *plan)
{
    Builder builder(plan->shape);
    Graph graph = plan->shape.backward ? builder.backward() : builder.forward();
    int64_t bytes = 0;
    auto result = graph->validate();
    if (result.is_good())
        result = graph->build_operation_graph(sdpa->handle);
    if (result.is_good())
        result = graph->create_execution_plans({fe::HeurMode_t::A});
    if (result.is_good())
        result = graph->check_support(sdpa->handle);
    if (result.is_good())
        result = graph->build_plans(sdpa->handle, fe::BuildPlanPolicy_t::HEURISTICS_CHOICE);
    if (result.is_good())
        result = graph->get_workspace_size(bytes);
    if (result.is_good()) {
        plan->graph = new Graph(graph);
        plan->workspace = (size_t)bytes;
    }
    return result;
}

static bool build(void *user, pmli_sdpa_plan *plan, char why[PMLI_SDPA_WHY])
{
    try {
        auto result = try_to_build((const pmli_sdpa *)user, plan);
        snprintf(why, PMLI_SDPA_WHY, "%s", result.get_message().c_str());
        return result.is_good();
    } catch (const std::exception &e) {
        snprintf(why, PMLI_SDPA_WHY, "%s", e.what());
        return false;
    }
}

static void drop(void *graph)
{
    delete (Graph *)graph;
}

extern "C" pml_status pmli_sdpa_new(pmli_sdpa **out, pml_error *err)
{
    *out = nullptr;
    void *handle = nullptr;
    pml_status status = pmli_open_library(&pmli_cudnn_library, PMLI_NEWEST_CUDNN, &handle, err);
    if (status != PML_OK)
        return status;
    fe::cudnn_dlhandle = handle;
    try {
        auto made = std::make_unique<pmli_sdpa>();
        const pmli_sdpa_builder builder = {build, drop, made.get()};
        cudnnStatus_t result = fe::detail::create_handle(&made->handle);
        if (result != CUDNN_STATUS_SUCCESS)
            return failed(err, "starting", fe::detail::get_error_string(result));
        status = pmli_sdpa_plans_new(&builder, &made->plans, err);
        if (status == PML_OK)
            *out = made.release();
        else
            fe::detail::destroy_handle(made->handle);
        return status;
    } catch (const std::exception &e) {
        return failed(err, "starting", e.what());
    }
}

extern "C" void pmli_sdpa_destroy(pmli_sdpa **sdpa)
{
    if (*sdpa == nullptr)
        return;
    pmli_sdpa_plans_destroy(&(*sdpa)->plans);
    fe::detail::destroy_handle((*sdpa)->handle);
    delete *sdpa;
    *sdpa = nullptr;
}

extern "C" size_t pmli_sdpa_version(const pmli_sdpa *sdpa)
{
    (void)sdpa;
    return fe::detail::get_backend_version();
}

static std::unordered_map<int64_t, void *> operands(const pmli_sdpa_call *c)
{
    auto at = [](const void *p) { return const_cast<void *>(p); };
    std::unordered_map<int64_t, void *> pack = {
        {Q, at(c->q)}, {K, at(c->k)}, {V, at(c->v)}, {O, c->o}, {STATS, c->stats}};
    if (c->shape.backward)
        pack.insert({{DOUT, at(c->dout)}, {DQ, c->dq}, {DK, c->dk}, {DV, c->dv}});
    if (c->shape.equal)
        return pack;
    pack.insert({{LENGTHS_Q, at(c->lengths)},
                 {LENGTHS_K, at(c->lengths)},
                 {AT_Q, at(c->at_q)},
                 {AT_K, at(c->at_k)},
                 {AT_V, at(c->at_v)},
                 {AT_O, at(c->at_o)},
                 {AT_STATS, at(c->at_stats)}});
    if (c->shape.backward)
        pack.insert({{AT_DOUT, at(c->at_dout)},
                     {AT_DQ, at(c->at_dq)},
                     {AT_DK, at(c->at_dk)},
                     {AT_DV, at(c->at_dv)}});
    return pack;
}

// With the plans to the caller alone.
static pml_status execute(const pmli_sdpa *sdpa, const pmli_sdpa_plan *plan, void *stream,
                          const pmli_sdpa_call *call, pml_error *err)
{
    try {
        cudnnStatus_t result = fe::detail::set_stream(sdpa->handle, (cudaStream_t)stream);
        if (result != CUDNN_STATUS_SUCCESS)
            return failed(err, "choosing a stream", fe::detail::get_error_string(result));
        auto pack = operands(call);
        auto executed = (*(Graph *)plan->graph)->execute(sdpa->handle, pack, call->workspace);
        return executed.is_good() ? PML_OK : failed(err, "attention", executed.get_message());
    } catch (const std::exception &e) {
        return failed(err, "attention", e.what());
    }
}

extern "C" pml_status pmli_sdpa_run(pmli_sdpa *sdpa, void *stream, const pmli_sdpa_call *call,
                                    bool waits, bool *done, pml_error *err)
{
    const pmli_sdpa_plan *plan;
    *done = false;
    pml_status status =
        pmli_sdpa_plans_take(sdpa->plans, &call->shape, call->workspace_size, waits, &plan, err);
    if (status != PML_OK || plan == nullptr)
        return status;
    status = execute(sdpa, plan, stream, call, err);
    pmli_sdpa_plans_release(sdpa->plans);
    *done = status == PML_OK;
    return status;
}

extern "C" pml_status pmli_sdpa_compile(pmli_sdpa *sdpa, const pmli_sdpa_call *call, bool *done,
                                        pml_error *err)
{
    const pmli_sdpa_plan *plan;
    pml_status status =
        pmli_sdpa_plans_take(sdpa->plans, &call->shape, call->workspace_size, true, &plan, err);
    *done = status == PML_OK && plan != nullptr;
    if (*done)
        pmli_sdpa_plans_release(sdpa->plans);
    return status;
}

extern "C" void pmli_sdpa_refused(pmli_sdpa *sdpa, char why[PMLI_SDPA_REFUSED], bool *some)
{
    char text[PMLI_SDPA_WHY];
    pmli_sdpa_plans_refused(sdpa->plans, text, some);
    snprintf(why, PMLI_SDPA_REFUSED, "%.*s", PMLI_SDPA_REFUSED - 1, text);
}

extern "C" void pmli_sdpa_ahead(pmli_sdpa *sdpa, bool on)
{
    pmli_sdpa_plans_ahead(sdpa->plans, on);
}

#include "fastsft/loss.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

LossTile tile_of(Check& check, py::handle logits_tensor, py::handle targets, py::handle bias, py::handle reference,
                 float softcap, float temperature) {
  const TensorView logits = check.floats("logits", logits_tensor, "T V", Layout::kRows);
  LossTile tile{.dtype = Check::dtype_of(logits),
                .logits = logits.data,
                .rows = check.size("T"),
                .vocab = check.size("V"),
                .stride = logits.strides[0],
                .targets = check.in<int64_t>("targets", targets, "T"),
                .bias = check.optional<float>("bias", bias, "V"),
                .reference = nullptr,
                .softcap = softcap,
                .temperature = temperature};
  if (!reference.is_none()) {
    const TensorView view = check.floats("reference", reference, "T V", Layout::kRows);
    check.same_dtype("reference", view, logits);
    check.require(view.strides == logits.strides, "reference", "the strides of logits", view.describe());
    tile.reference = view.data;
  }
  return tile;
}

LossStats stats_of(Check& check, py::handle stats) {
  float* row = check.in<float>("stats", stats, "6 T");
  const int64_t n = check.size("T");
  return {row, row + n, row + 2 * n, row + 3 * n, row + 4 * n, row + 5 * n};
}

void loss_stats_checked(py::handle logits, py::handle targets, py::handle bias, py::handle reference, float softcap,
                        float temperature, bool forward_divergence, py::handle stats_tensor) {
  Check check("loss_stats");
  const LossTile tile = tile_of(check, logits, targets, bias, reference, softcap, temperature);
  const LossStats stats = stats_of(check, stats_tensor);
  const Divergence divergence = forward_divergence ? Divergence::kForward : Divergence::kReverse;
  py::gil_scoped_release release;
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) return cuda::loss_stats(tile, divergence, stats, check.stream());
#endif
  FASTSFT_CHECK(!check.on_cuda(), "loss_stats: logits: this build has no CUDA kernels");
  loss_stats(tile, divergence, stats);
}

void loss_gradient_checked(py::handle logits, py::handle targets, py::handle bias, py::handle reference, float softcap,
                           float temperature, py::handle stats_tensor, py::handle coefficients_tensor) {
  Check check("loss_gradient");
  const LossTile tile = tile_of(check, logits, targets, bias, reference, softcap, temperature);
  const LossStats stats = stats_of(check, stats_tensor);
  const float* row = check.in<float>("coefficients", coefficients_tensor, "6 T");
  const int64_t n = tile.rows;
  const LossCoefficients coefficients{row, row + n, row + 2 * n, row + 3 * n, row + 4 * n, row + 5 * n};
  py::gil_scoped_release release;
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) return cuda::loss_gradient(tile, stats, coefficients, check.stream());
#endif
  FASTSFT_CHECK(!check.on_cuda(), "loss_gradient: logits: this build has no CUDA kernels");
  loss_gradient(tile, stats, coefficients);
}

}  // namespace

void register_loss(py::module_& m) {
  m.def("loss_stats", &loss_stats_checked, py::arg("logits"), py::arg("targets"), py::arg("bias"), py::arg("reference"),
        py::arg("softcap"), py::arg("temperature"), py::arg("forward_divergence"), py::arg("stats"));
  m.def("loss_gradient", &loss_gradient_checked, py::arg("logits"), py::arg("targets"), py::arg("bias"),
        py::arg("reference"), py::arg("softcap"), py::arg("temperature"), py::arg("stats"), py::arg("coefficients"));
}

}  // namespace fastsft::bindings

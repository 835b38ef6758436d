#include "fastsft/loss.h"
#include "tensor_view.h"

namespace fastsft::bindings {
namespace {

void loss_rows_checked(py::handle logits_tensor, py::handle bias, py::handle targets, py::handle token_weights,
                       py::handle grad_weights, py::handle entropy_grads, py::handle ref_logprobs, int objective,
                       float argument, float softcap, float temperature, float label_smoothing, float z_loss,
                       bool write_gradient, py::handle loss, py::handle logprob, py::handle entropy,
                       py::handle weight) {
  Check check("loss_rows");
  const TensorView logits = check.floats("logits", logits_tensor, "T V");
  const LossRows rows{.dtype = Check::dtype_of(logits),
                      .logits = logits.data,
                      .rows = check.size("T"),
                      .vocab = check.size("V"),
                      .stride = check.size("V"),
                      .bias = check.optional<float>("bias", bias, "V"),
                      .targets = check.in<int64_t>("targets", targets, "T"),
                      .token_weights = check.in<float>("token_weights", token_weights, "T"),
                      .grad_weights = check.in<float>("grad_weights", grad_weights, "T"),
                      .entropy_grads = check.optional<float>("entropy_grads", entropy_grads, "T"),
                      .ref_logprobs = check.optional<float>("ref_logprobs", ref_logprobs, "T"),
                      .objective = static_cast<Objective>(objective),
                      .argument = argument,
                      .softcap = softcap,
                      .temperature = temperature,
                      .label_smoothing = label_smoothing,
                      .z_loss = z_loss,
                      .write_gradient = write_gradient,
                      .loss = check.in<float>("loss", loss, "T"),
                      .logprob = check.in<float>("logprob", logprob, "T"),
                      .entropy = check.in<float>("entropy", entropy, "T"),
                      .weight = check.in<float>("weight", weight, "T")};
  py::gil_scoped_release release;
#if defined(FASTSFT_WITH_CUDA)
  if (check.on_cuda()) return cuda::loss_rows(rows, check.stream());
#endif
  FASTSFT_CHECK(!check.on_cuda(), "loss_rows: logits: this build has no CUDA kernels");
  loss_rows(rows);
}

}  // namespace

void register_loss(py::module_& m) {
  m.def("loss_rows", &loss_rows_checked, py::arg("logits"), py::arg("bias"), py::arg("targets"),
        py::arg("token_weights"), py::arg("grad_weights"), py::arg("entropy_grads"), py::arg("ref_logprobs"),
        py::arg("objective"), py::arg("argument"), py::arg("softcap"), py::arg("temperature"),
        py::arg("label_smoothing"), py::arg("z_loss"), py::arg("write_gradient"), py::arg("loss"), py::arg("logprob"),
        py::arg("entropy"), py::arg("weight"));
}

}  // namespace fastsft::bindings

#include "attention_bwd_sm80.cuh"

namespace fastsft::cuda {
template void launch_attention_delta<Float16>(const BackwardArguments&, int64_t, void*);
template void launch_attention_dq<Float16>(const BackwardArguments&, int64_t, void*);
}  // namespace fastsft::cuda

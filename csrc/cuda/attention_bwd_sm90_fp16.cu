#include "attention_bwd_sm90.cuh"

namespace fastsft::cuda {
template void launch_attention_backward_sm90<Float16, true>(const BackwardArguments&, const AttentionShape&, void*);
template void launch_attention_backward_sm90<Float16, false>(const BackwardArguments&, const AttentionShape&, void*);
}  // namespace fastsft::cuda

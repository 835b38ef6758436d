#include "attention_bwd_sm90.cuh"

namespace fastsft::cuda {
template void launch_attention_backward_sm90<BFloat16, true>(const BackwardArguments&, const AttentionShape&, void*);
template void launch_attention_backward_sm90<BFloat16, false>(const BackwardArguments&, const AttentionShape&, void*);
}  // namespace fastsft::cuda

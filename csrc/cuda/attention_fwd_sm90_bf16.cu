#include "attention_fwd_sm90.cuh"

namespace fastsft::cuda {
template void launch_attention_forward_sm90<BFloat16>(const ForwardArguments&, const AttentionShape&, void*);
}

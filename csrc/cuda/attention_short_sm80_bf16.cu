#include "attention_short_sm80.cuh"

namespace fastsft::cuda {
template void launch_attention_short<BFloat16>(const BackwardArguments&, const AttentionBatch&, int64_t, void*);
}

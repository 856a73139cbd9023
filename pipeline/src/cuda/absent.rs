//! The tensor library's GGUF and mixture-of-experts launchers, which this program leaves out.
//!
//! Its device code for quantised tensors names them, so a program without them does not link; nothing here makes such a tensor. Their
//! objects are most of the time and most of the bytes of a build, and the only thing that needs NVIDIA's runtime library.

macro_rules! absent {
    ($($name:ident)*) => { $(
        /// Never called: no weight is stored as GGUF. Were it called, going on would mean wrong numbers.
        #[unsafe(no_mangle)]
        extern "C" fn $name() {
            std::process::abort()
        }
    )* };
}

absent! {
    moe_gemm_wmma moe_gemm_gguf moe_gemm_gguf_prefill launch_mmvq_gguf_q4_0_bf16_plain launch_mmvq_gguf_q4_1_bf16_plain
    launch_mmvq_gguf_q5_0_bf16_plain launch_mmvq_gguf_q5_1_bf16_plain launch_mmvq_gguf_q8_0_bf16_plain
    launch_mmvq_gguf_q2_k_bf16_plain launch_mmvq_gguf_q3_k_bf16_plain launch_mmvq_gguf_q4_k_bf16_plain
    launch_mmvq_gguf_q5_k_bf16_plain launch_mmvq_gguf_q6_k_bf16_plain launch_mmvq_gguf_q4_0_f32_plain
    launch_mmvq_gguf_q4_1_f32_plain launch_mmvq_gguf_q5_0_f32_plain launch_mmvq_gguf_q5_1_f32_plain
    launch_mmvq_gguf_q8_0_f32_plain launch_mmvq_gguf_q2_k_f32_plain launch_mmvq_gguf_q3_k_f32_plain
    launch_mmvq_gguf_q4_k_f32_plain launch_mmvq_gguf_q5_k_f32_plain launch_mmvq_gguf_q6_k_f32_plain
    launch_mmvq_gguf_q4_0_f16_plain launch_mmvq_gguf_q4_1_f16_plain launch_mmvq_gguf_q5_0_f16_plain
    launch_mmvq_gguf_q5_1_f16_plain launch_mmvq_gguf_q8_0_f16_plain launch_mmvq_gguf_q2_k_f16_plain
    launch_mmvq_gguf_q3_k_f16_plain launch_mmvq_gguf_q4_k_f16_plain launch_mmvq_gguf_q5_k_f16_plain
    launch_mmvq_gguf_q6_k_f16_plain launch_mmvq_gguf_quantize_q8_1_bf16 launch_mmvq_gguf_quantize_q8_1_f16
    launch_mmvq_gguf_quantize_q8_1_f32 launch_mmq_quantize_q8_1_D4 launch_mmq_quantize_q8_1_DS4 launch_mmq_quantize_q8_1_D2S6
    launch_mmq_gguf_q4_0 launch_mmq_gguf_q4_1 launch_mmq_gguf_q5_0 launch_mmq_gguf_q5_1 launch_mmq_gguf_q8_0
    launch_mmq_gguf_q2_k launch_mmq_gguf_q3_k launch_mmq_gguf_q4_k launch_mmq_gguf_q5_k launch_mmq_gguf_q6_k
}

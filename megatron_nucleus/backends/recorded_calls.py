"""What `recorded.py` keeps: every call of an optional library, as it was read in the library's source."""

from __future__ import annotations

from typing import NamedTuple


class Call(NamedTuple):
    """One function or method.

    name: dotted path inside the module. signature: all parameters in order, with ``=`` behind those that have a
    default and * before those that go by keyword alone. used: what the adapter passes: keywords, or the number of
    positions where the function is compiled and has no names.
    """

    name: str
    signature: str
    used: str


class Library(NamedTuple):
    """One importable module of one library.

    name: what this project calls it. module: import path. package: distribution whose version is shown; None = it
    has none of its own. read: where and when the record was read.
    """

    name: str
    module: str
    package: str | None
    read: str
    calls: tuple[Call, ...]


_FLASH = "github.com/Dao-AILab/flash-attention"
_DEEPEP = "github.com/deepseek-ai/DeepEP"
LIBRARIES = (
    Library(
        "flash_attn_2",
        "flash_attn.flash_attn_interface",
        "flash-attn",
        f"{_FLASH} 2.8.4 (commit 0251105a), August 2026; returns a tensor",
        (
            Call(
                "flash_attn_func",
                "q k v dropout_p= softmax_scale= causal= window_size= softcap= alibi_slopes= deterministic= "
                "return_attn_probs=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p= softmax_scale= causal= "
                "window_size= softcap= alibi_slopes= deterministic= return_attn_probs= block_table=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "flash_attn_3",
        "flash_attn_interface",
        "flash_attn_3",
        f"{_FLASH}/hopper (commit 0251105a), August 2026; returns a tensor, before August 2025 (tensor, lse)",
        (
            Call(
                "flash_attn_func",
                "q k v softmax_scale= causal= qv= q_descale= k_descale= v_descale= window_size= attention_chunk= "
                "softcap= num_splits= pack_gqa= deterministic= sm_margin= return_attn_probs=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q= seqused_k= softmax_scale= "
                "causal= qv= q_descale= k_descale= v_descale= window_size= attention_chunk= softcap= num_splits= "
                "pack_gqa= deterministic= sm_margin= return_attn_probs=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "flash_attn_4",
        "flash_attn.cute",
        "flash-attn-4",
        "the package flash-attn-4 4.0.0b36, November 2026; returns (tensor, lse or None)",
        (
            Call(
                "flash_attn_func",
                "q k v qv= gather_kv_indices= softmax_scale= causal= window_size= learnable_sink= softcap= "
                "num_splits= pack_gqa= deterministic= score_mod= score_mod_bwd= mask_mod= aux_tensors= aux_scalars= "
                "block_sparse_tensors= block_sparse_tensors_bwd= return_lse= gather_bwd_recompute_p= "
                "gather_bwd_token_chunk=",
                "q k v deterministic",
            ),
            Call(
                "flash_attn_varlen_func",
                "q k v qv= cu_seqlens_q= cu_seqlens_k= max_seqlen_q= max_seqlen_k= min_seqlen_k= seqused_q= "
                "seqused_k= gather_kv_indices= page_table= softmax_scale= causal= window_size= learnable_sink= "
                "softcap= num_splits= pack_gqa= deterministic= score_mod= score_mod_bwd= mask_mod= "
                "block_sparse_tensors= aux_tensors= aux_scalars= return_lse= scheduler_metadata= "
                "seqlen_k_per_split= disable_scheduler_metadata= gather_bwd_recompute_p= gather_bwd_token_chunk=",
                "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k deterministic",
            ),
        ),
    ),
    Library(
        "transformer_engine attention",
        "transformer_engine.pytorch",
        "transformer-engine",
        "github.com/NVIDIA/TransformerEngine 2.20.0.dev0 (commit d0067d0d), August 2026; returns [B, S, H*K]",
        (
            Call(
                "DotProductAttention.__init__",
                "self num_attention_heads kv_channels num_gqa_groups= attention_dropout= qkv_format= attn_mask_type= "
                "window_size= bottom_right_diagonal= sequence_parallel= tp_size= get_rng_state_tracker= tp_group= "
                "layer_number= attention_type= cp_group= cp_global_ranks= cp_stream= cp_comm_type= softmax_scale= "
                "softmax_type= return_max_logit= name=",
                "num_attention_heads kv_channels num_gqa_groups attention_dropout qkv_format attn_mask_type "
                "attention_type",
            ),
            Call(
                "DotProductAttention.forward",
                "self query_layer= key_layer= value_layer= attention_mask= qkv_format= cu_seqlens_q= cu_seqlens_kv= "
                "cu_seqlens_q_padded= cu_seqlens_kv_padded= max_seqlen_q= max_seqlen_kv= attn_mask_type= "
                "window_size= bottom_right_diagonal= checkpoint_core_attention= core_attention_bias_type= "
                "core_attention_bias= alibi_slopes= fast_zero_fill= inference_params= pad_between_seqs= fp8_output= "
                "bf16_backward= num_splits= score_mod= score_mod_bprop= score_mod_tensors= score_mod_bprop_tensors= "
                "qkv_layer= kv_layer= qkv_interleave_dim=",
                "query_layer key_layer value_layer cu_seqlens_q cu_seqlens_kv max_seqlen_q max_seqlen_kv "
                "attn_mask_type",
            ),
        ),
    ),
    Library(
        "torchao float8",
        "torchao.float8",
        "torchao",
        "the package torchao 0.18.0, November 2026",
        (
            Call(
                "convert_to_float8_training",
                "module *module_filter_fn= *config=",
                "module module_filter_fn config",
            ),
            Call("Float8LinearConfig.from_recipe_name", "recipe_name", "recipe_name"),
        ),
    ),
    Library(
        "torchao grouped product",
        "torchao.prototype.moe_training.fp8_grouped_mm",
        "torchao",
        "the package torchao 0.18.0, November 2026; a prototype",
        (
            Call(
                "_to_fp8_rowwise_then_scaled_grouped_mm",
                "A B_t offs out_dtype= float8_dtype= pad_token_groups_for_grouped_mm=",
                "A B_t offs out_dtype pad_token_groups_for_grouped_mm",
            ),
        ),
    ),
    Library(
        "transformer_engine fp8",
        "transformer_engine.pytorch",
        "transformer-engine",
        "github.com/NVIDIA/TransformerEngine 2.20.0.dev0 (commit d0067d0d), August 2026",
        (
            Call("autocast", "enabled= calibrating= recipe= amax_reduction_group= _graph=", "enabled recipe"),
            Call(
                "Linear.__init__",
                "self in_features out_features sequence_parallel= fuse_wgrad_accumulation= tp_group= tp_size= "
                "get_rng_state_tracker= rng_tracker_name= init_method= bias= return_bias= params_dtype= "
                "parallel_mode= parameters_split= device= ub_overlap_ag= ub_overlap_rs= ub_overlap_rs_dgrad= "
                "ub_bulk_dgrad= ub_bulk_wgrad= ub_name= delay_wgrad_compute= symmetric_ar_type= "
                "save_original_input= name=",
                "in_features out_features bias params_dtype device",
            ),
            Call("Linear.forward", "self inp is_first_microbatch= fp8_output= fp8_grad=", "inp"),
            Call("is_fp8_available", "return_reason=", "return_reason"),
            Call("is_fp8_block_scaling_available", "return_reason=", "return_reason"),
            Call("is_mxfp8_available", "return_reason=", "return_reason"),
        ),
    ),
    Library(
        "transformer_engine recipes",
        "transformer_engine.common.recipe",
        "transformer-engine",
        "github.com/NVIDIA/TransformerEngine 2.20.0.dev0 (commit d0067d0d), August 2026; other recipes by default",
        (
            Call(
                "DelayedScaling",
                "margin= fp8_format= amax_history_len= amax_compute_algo= scaling_factor_compute_algo= reduce_amax= "
                "fp8_dpa= fp8_mha= backward_override=",
                "reduce_amax",
            ),
        ),
    ),
    Library(
        "apex",
        "amp_C",
        None,  # the package of that name in public registries is another project
        "github.com/NVIDIA/apex csrc/amp_C_frontend.cpp (commit 6424da3b), July 2026; compiled, by position alone",
        (
            # chunk_size, noop_flag, [grads, params, first averages, second averages], lr, beta1, beta2, epsilon, step,
            # mode (1 = decoupled decay), bias_correction, weight_decay
            Call("multi_tensor_adam", "/ / / / / / / / / / /", "11"),
            # chunk_size, noop_flag, [tensors], per_tensor -> (norm of all, norms of each)
            Call("multi_tensor_l2norm", "/ / / /", "4"),
        ),
    ),
    Library(
        "deepep",
        "deep_ep",
        "deep_ep",
        f"{_DEEPEP} 2.1.0 (commit dd758ca), July 2026",
        (
            Call(
                "ElasticBuffer.__init__",
                "self group num_bytes= num_cpu_bytes= num_max_tokens_per_rank= hidden= num_topk= use_fp8_dispatch= "
                "deterministic= allow_hybrid_mode= allow_multiple_reduction= prefer_overlap_with_compute= sl_idx= "
                "num_allocated_qps= num_cpu_timeout_secs= num_gpu_timeout_secs= explicitly_destroy=",
                "group num_max_tokens_per_rank hidden num_topk deterministic",
            ),
            Call(
                "ElasticBuffer.dispatch",
                "self x topk_idx= topk_weights= cumulative_local_expert_recv_stats= num_experts= "
                "num_max_tokens_per_rank= expert_alignment= num_sms= num_qps= previous_event= "
                "previous_event_before_epilogue= "
                "async_with_compute_stream= allocate_on_comm_stream= handle= do_handle_copy= do_cpu_sync= do_expand= "
                "do_zero_padding= use_tma_aligned_col_major_sf=",
                "x topk_idx topk_weights num_experts num_max_tokens_per_rank handle do_cpu_sync",
            ),
            Call(
                "ElasticBuffer.combine",
                "self x handle topk_weights= bias= num_sms= num_qps= previous_event= previous_event_before_epilogue= "
                "async_with_compute_stream= allocate_on_comm_stream=",
                "x handle topk_weights",
            ),
        ),
    ),
    Library(
        "deepep Buffer",
        "deep_ep",
        "deep_ep",
        f"{_DEEPEP} 2.1.0 (commit dd758ca), July 2026; for versions without ElasticBuffer",
        (
            Call(
                "Buffer.__init__",
                "self group num_nvl_bytes= num_rdma_bytes= low_latency_mode= num_qps_per_rank= "
                "allow_nvlink_for_low_latency_mode= allow_mnnvl= explicitly_destroy= enable_shrink= comm=",
                "group num_nvl_bytes num_rdma_bytes",
            ),
            Call("Buffer.get_dispatch_config", "num_ranks", "num_ranks"),
            Call("Buffer.get_combine_config", "num_ranks", "num_ranks"),
            Call(
                "Buffer.get_dispatch_layout",
                "self topk_idx num_experts previous_event= async_finish= allocate_on_comm_stream=",
                "topk_idx num_experts",
            ),
            Call(
                "Buffer.dispatch",
                "self x handle= num_tokens_per_rank= num_tokens_per_rdma_rank= is_token_in_rank= "
                "num_tokens_per_expert= topk_idx= topk_weights= expert_alignment= num_worst_tokens= config= "
                "previous_event= async_finish= allocate_on_comm_stream=",
                "x handle num_tokens_per_rank num_tokens_per_rdma_rank is_token_in_rank num_tokens_per_expert topk_idx "
                "topk_weights num_worst_tokens",
            ),
            Call(
                "Buffer.combine",
                "self x handle topk_weights= bias= config= previous_event= async_finish= allocate_on_comm_stream=",
                "x handle topk_weights",
            ),
        ),
    ),
    Library(
        "hybridep",
        "deep_ep",
        "deep_ep",
        f"{_DEEPEP}, branch hybrid-ep (commit 94a9f8f), July 2026",
        (
            Call(
                "HybridEPBuffer.__init__",
                "self group hidden_dim max_num_of_tokens_per_rank num_local_experts use_fp8= num_sms_dispatch_api= "
                "num_sms_combine_api= num_sms_preprocessing_api= num_blocks_permute= num_blocks_unpermute= "
                "load_cached_kernels= use_shared_buffer= enable_custom_allgather= "
                "num_of_hybrid_ep_ranks_per_nvlink_domain= use_mnnvl=",
                "group hidden_dim max_num_of_tokens_per_rank num_local_experts",
            ),
            Call(
                "HybridEPBuffer.dispatch_with_permute",
                "self *hidden *topk_idx= *topk_weights= *num_of_experts_per_rank= *num_of_experts= *use_fp8= "
                "*routing_map= *probs= *scaling_factor= *num_permuted_tokens= *pad_multiple= *handle= *non_blocking= "
                "*fuse_permute_dispatch= *num_dispatched_tokens= *use_host_meta=",
                "hidden routing_map probs num_permuted_tokens handle non_blocking",
            ),
            Call(
                "HybridEPBuffer.combine_with_unpermute",
                "self *hidden *probs= *handle= *pad_multiple= *fuse_unpermute_combine= *num_dispatched_tokens=",
                "hidden probs handle",
            ),
        ),
    ),
)

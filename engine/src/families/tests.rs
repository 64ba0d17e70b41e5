//! Configurations of every family: variants that load, and those refused by name.

use super::*;
use kernels::program::Mask;
use serde_json::{Map, Value, json};
use std::path::PathBuf;

/// The configuration of a golden case with some keys set (or removed, by `"-"`).
fn edited(case: &str, edits: Value) -> Result<ModelSpec, Error> {
    let Value::Object(mut map) = testkit::golden_json(&format!("decoders/{case}/config.json"))
    else {
        panic!("an object is needed")
    };
    let Value::Object(edits) = edits else { panic!("an object is needed") };
    for (key, value) in edits {
        match value.as_str() {
            Some("-") => map.remove(&key),
            _ => map.insert(key, value),
        };
    }
    spec(map)
}

fn spec(map: Map<String, Value>) -> Result<ModelSpec, Error> {
    let config = Reader::new(PathBuf::from("config.json"), map);
    let spec = read(&config)?;
    config.value("eos_token_id");
    config.finish()?;
    Ok(spec)
}

#[track_caller]
fn refused(case: &str, edits: Value, key: &str) {
    let err = edited(case, edits).unwrap_err();
    match &err {
        Error::Config { key: found, .. } => assert_eq!(found, key, "{err}"),
        Error::UnknownKeys { keys, .. } => assert_eq!(keys, key, "{err}"),
        _ => panic!("{err}"),
    }
}

fn masks(spec: &ModelSpec) -> Vec<Mask> {
    spec.layers.iter().map(|l| l.attn.mask).collect()
}

#[test]
fn llama_fills_in_what_is_missing() {
    let spec = edited(
        "llama_mha",
        json!({"head_dim": "-", "num_key_value_heads": "-", "attention_bias": "-", "mlp_bias": "-",
            "tie_word_embeddings": "-", "rope_parameters": "-", "hidden_act": "-"}),
    );
    let plain = edited("llama_mha", json!({})).unwrap();
    assert_eq!(spec.unwrap(), plain);
    let attn = &plain.layers[0].attn;
    assert_eq!((attn.heads, attn.kv_heads, attn.head_width), (4, 4, 16));
    assert_eq!(attn.scale, 0.25);
    assert!(!attn.qkv_bias && !attn.out_bias && !plain.layers[0].mlp.bias && !plain.tied_head);
    assert_eq!(edited("llama_mha", json!({"hidden_act": "swish"})).unwrap(), plain);
    let both = json!({"attention_bias": true, "mlp_bias": true});
    let layer = &edited("llama_mha", both).unwrap().layers[1];
    assert!(layer.attn.qkv_bias && layer.attn.out_bias && layer.mlp.bias);
    assert_eq!(edited("llama_head_dim", json!({})).unwrap().layers[0].attn.head_width, 24);
}

/// Up to it a token's rotary speeds are the same in every prompt.
#[test]
fn the_steady_length_ends_where_a_layers_speeds_begin_to_follow_the_length() {
    let rope = |rope: Value| edited("llama_mha", json!({"rope_parameters": rope})).unwrap();
    let dynamic = json!({"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4});
    let factors = [1.5; 8];
    let long = json!({"rope_type": "longrope", "original_max_position_embeddings": 24,
        "rope_theta": 1e4, "short_factor": factors, "long_factor": factors});
    let linear = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4});
    let (dynamic, long) = (rope(dynamic), rope(long));
    assert_eq!(rope(linear).steady_len(), u32::MAX);
    let kernels::program::RopeSpeeds::DynamicNtk { trained, .. } =
        &dynamic.layers[0].attn.rope.speeds
    else {
        panic!("{dynamic:?}")
    };
    assert_eq!((dynamic.steady_len(), long.steady_len()), (*trained, 24));
    let mut mixed = rope(json!({"rope_type": "default", "rope_theta": 1e4}));
    mixed.layers.push(long.layers[0].clone());
    assert_eq!(mixed.steady_len(), 24);
}

#[test]
fn absurd_sizes_are_refused() {
    for (key, value) in [
        ("num_attention_heads", json!(0)),
        ("num_attention_heads", json!(-4)),
        ("hidden_size", json!(1e30)),
        ("hidden_size", json!("64")),
        ("num_hidden_layers", json!(1_000_000_000)),
        ("num_hidden_layers", json!(0)),
        ("vocab_size", json!(u64::MAX)),
        ("intermediate_size", json!(null)),
        ("max_position_embeddings", json!(0)),
        ("rms_norm_eps", json!(-1e-5)),
        ("rms_norm_eps", json!(1e30)),
        ("head_dim", json!(15)),
        ("head_dim", json!(65536)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!(8)),
        ("tie_word_embeddings", json!("yes")),
    ] {
        refused("llama_mha", json!({key: value}), key);
    }
    refused("llama_mha", json!({"head_dim": null, "hidden_size": 66}), "num_attention_heads");
}

#[test]
fn features_that_change_the_result_are_refused_by_name() {
    for (case, key, value) in [
        ("llama_mha", "hidden_act", json!("gelu")),
        ("llama_mha", "sliding_window", json!(32)),
        ("llama_mha", "partial_rotary_factor", json!(0.5)),
        ("llama_mha", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("llama_mha", "final_logit_softcapping", json!(30.0)),
        ("llama_mha", "logits_scaling", json!(8)),
        ("llama_mha", "embedding_multiplier", json!(12)),
        ("llama_mha", "is_encoder_decoder", json!(true)),
        ("llama_mha", "num_local_experts", json!(8)),
        ("llama_mha", "pruned_heads", json!({"0": [1]})),
        ("llama_mha", "tie_encoder_decoder", json!(true)),
        ("llama_mha", "auto_map", json!({"AutoModel": "x.Y"})),
        ("mistral_sliding32", "attention_bias", json!(true)),
        ("mistral_sliding32", "sliding_window", json!("32")),
        ("mistral_sliding32", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("qwen2", "mlp_bias", json!(true)),
        ("qwen2", "layer_types", json!(["full_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "chunked_attention"])),
        ("qwen2", "layer_types", json!(["full_attention", "sliding_attention"])),
        ("qwen3", "use_mrope", json!(true)),
    ] {
        refused(case, json!({key: value}), key);
    }
}

#[test]
fn keys_that_say_nothing_are_accepted() {
    let edits = json!({"sliding_window": null, "some_future_key": null, "use_cache": false,
        "layer_types": ["full_attention", "full_attention"], "is_encoder_decoder": false,
        "torch_dtype": "float16", "temperature": 0.7, "_name_or_path": "x", "is_decoder": false,
        "tie_encoder_decoder": false, "output_past": true, "pruned_heads": {},
        "cross_attention_hidden_size": null, "model_max_length": 4096,
        "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
        "_flash_attn_2_enabled": true, "_attn_implementation_internal": "sdpa"});
    assert_eq!(edited("llama_mha", edits).unwrap(), edited("llama_mha", json!({})).unwrap());
}

#[test]
fn mistral_slides_by_default_and_not_on_null() {
    let window = |edits| masks(&edited("mistral_sliding32", edits).unwrap())[1];
    assert_eq!(window(json!({})), Mask::Window(32));
    assert_eq!(window(json!({"sliding_window": "-"})), Mask::Window(4096));
    assert_eq!(window(json!({"sliding_window": null})), Mask::Causal);
    let listed = json!({"layer_types": ["sliding_attention", "sliding_attention"]});
    assert_eq!(window(listed), Mask::Window(32));
    let spec = edited("mistral_sliding32", json!({"num_key_value_heads": "-"})).unwrap();
    assert_eq!(spec.layers[0].attn.kv_heads, 4, "8 cannot divide 4 heads");
    let heads = json!({"num_key_value_heads": "-", "num_attention_heads": 16, "head_dim": 4});
    assert_eq!(edited("mistral_sliding32", heads).unwrap().layers[0].attn.kv_heads, 8);
    let null = json!({"num_key_value_heads": null, "num_attention_heads": 16, "head_dim": 4});
    assert_eq!(edited("mistral_sliding32", null).unwrap().layers[0].attn.kv_heads, 16);
}

#[test]
fn qwen_slides_where_it_says() {
    let found = |edits| masks(&edited("qwen2_sliding", edits).unwrap());
    let (causal, window) = (Mask::Causal, Mask::Window(32));
    assert_eq!(found(json!({})), [causal, window, window]);
    let unlisted = |extra: Value| {
        let mut edits = json!({"layer_types": "-"});
        edits.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        found(edits)
    };
    assert_eq!(unlisted(json!({})), [causal, window, window]);
    assert_eq!(unlisted(json!({"max_window_layers": 2})), [causal, causal, window]);
    assert_eq!(unlisted(json!({"max_window_layers": 0})), [window; 3]);
    assert_eq!(unlisted(json!({"max_window_layers": "-"})), [causal; 3]);
    assert_eq!(unlisted(json!({"use_sliding_window": false})), [causal; 3]);
    assert_eq!(unlisted(json!({"sliding_window": null})), [causal; 3]);
    let off = json!({"use_sliding_window": false, "sliding_window": 0});
    assert_eq!(unlisted(off), [causal; 3], "a window that is off has no size");
    let other = json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]});
    assert_eq!(found(other), [window, causal, causal], "the list outranks max_window_layers");
    refused("qwen2_sliding", json!({"use_sliding_window": false}), "layer_types");
}

#[test]
fn qwen_has_its_biases_and_norms() {
    let qwen2 = edited("qwen2", json!({"attention_bias": false})).unwrap();
    let attn = &qwen2.layers[0].attn;
    assert!(attn.qkv_bias && !attn.out_bias && attn.qk_norm_eps.is_none());
    let qwen3 = edited("qwen3", json!({"attention_bias": true})).unwrap();
    let attn = &qwen3.layers[0].attn;
    assert!(attn.qkv_bias && attn.out_bias);
    assert_eq!((attn.qk_norm_eps, attn.head_width), (Some(1e-6), 32));
    let missing = edited("qwen3", json!({"head_dim": "-"})).unwrap();
    assert_eq!(missing.layers[0].attn.head_width, 128);
    assert_eq!(qwen3.architecture, "Qwen3ForCausalLM");
}

#[test]
fn bitnet_has_sub_norms_and_says_what_it_needs() {
    let config = json!({"architectures": ["BitNetForCausalLM"], "model_type": "bitnet",
        "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_theta": 500000.0});
    let bitnet = |edits: Value| {
        let mut all = config.clone();
        all.as_object_mut().unwrap().extend(edits.as_object().unwrap().clone());
        edited("llama_mha", all)
    };
    let plain = json!({"rope_parameters": "-"});
    let layer = &bitnet(plain.clone()).unwrap().layers[1];
    let norms = [layer.attn.out_norm_eps, layer.mlp.down_norm_eps];
    assert_eq!(norms, [Some(1e-5); 2]);
    assert!(!layer.attn.qkv_bias && !layer.attn.out_bias && !layer.mlp.bias);
    let llama = edited("llama_mha", json!({})).unwrap();
    assert!(llama.layers.iter().all(|l| l.attn.out_norm_eps.is_none()));
    assert!(llama.layers.iter().all(|l| l.mlp.down_norm_eps.is_none()));
    let nested = json!({"rope_theta": "-",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}});
    assert_eq!(bitnet(nested).unwrap(), bitnet(plain).unwrap());
    for (key, value) in [
        ("hidden_act", json!("-")),
        ("hidden_act", json!("relu2")),
        ("rms_norm_eps", json!("-")),
        ("rope_theta", json!("-")),
        ("mlp_bias", json!(true)),
    ] {
        let err = bitnet(json!({"rope_parameters": "-", key: value})).unwrap_err();
        assert!(matches!(&err, Error::Config { key: found, .. } if found == key), "{err}");
    }
}

#[test]
fn architectures_are_found_by_name_or_type() {
    let name = |edits| edited("qwen2", edits).map(|s| s.architecture);
    assert_eq!(name(json!({"architectures": "-"})).unwrap(), "Qwen2ForCausalLM");
    assert_eq!(name(json!({"architectures": ["Qwen2Model"]})).unwrap(), "Qwen2ForCausalLM");
    let unknown = |edits| match name(edits).unwrap_err() {
        Error::Architecture { found, known } => {
            assert!(known.contains("LlamaForCausalLM, MistralForCausalLM"), "{known}");
            found
        }
        other => panic!("{other}"),
    };
    assert_eq!(unknown(json!({"architectures": ["PhiForCausalLM"]})), "PhiForCausalLM");
    assert_eq!(unknown(json!({"architectures": "-", "model_type": "phi"})), "phi");
    assert_eq!(unknown(json!({"architectures": "-", "model_type": "-"})), "nothing");
    refused("qwen2", json!({"model_type": "llama"}), "model_type");
    refused("qwen2", json!({"architectures": "Qwen2ForCausalLM"}), "architectures");
}

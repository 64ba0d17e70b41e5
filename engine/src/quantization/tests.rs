//! Settings of every quantizer: what loads, module by module, and what is refused by key.

use super::*;
use serde_json::{Value, json};
use std::path::PathBuf;

const Q: &str = "model.layers.0.self_attn.q_proj";
const DOWN: &str = "model.layers.11.mlp.down_proj";

fn read(config: Value) -> Result<Quantization, Error> {
    let map = serde_json::Map::from_iter([("quantization_config".to_owned(), config)]);
    let files = ModelFiles::Embedded { name: "m", files: &[] };
    Quantization::read(&files, &Reader::new(PathBuf::from("config.json"), map))
}

/// `base` with the keys of `extra`.
fn with(base: &Value, extra: Value) -> Value {
    let mut all = base.clone();
    let Value::Object(extra) = extra else { panic!() };
    all.as_object_mut().unwrap().extend(extra);
    all
}

fn wording(config: Value, name: &str) -> String {
    let found = read(config).unwrap_or_else(|e| panic!("{e}")).packing(name).unwrap();
    found.map_or("floats".to_owned(), |p| p.to_string())
}

#[track_caller]
fn refused(config: Value, key: &str) {
    let err = match read(config) {
        Ok(quantization) => quantization.packing(Q).unwrap_err(),
        Err(err) => err,
    };
    match &err {
        Error::Config { key: found, .. } => assert_eq!(found, key, "{err}"),
        Error::UnknownKeys { keys, .. } => assert_eq!(keys, key, "{err}"),
        _ => panic!("{err}"),
    }
}

fn gptq() -> Value {
    json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false, "sym": true})
}

fn awq() -> Value {
    json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
        "zero_point": true, "modules_to_not_convert": null})
}

fn compressed(weights: Value) -> Value {
    let base = json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128,
        "symmetric": true, "dynamic": false});
    json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": null,
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null,
            "weights": with(&base, weights)}}})
}

#[test]
fn gptq_versions_and_widths() {
    assert_eq!(wording(gptq(), Q), "gptq v1 4-bit g128 sym");
    assert_eq!(wording(gptq(), "lm_head"), "floats");
    let v2 = json!({"checkpoint_format": "gptq_v2", "format": "gptq_v2", "sym": false});
    assert_eq!(wording(with(&gptq(), v2), Q), "gptq v2 4-bit g128 asym");
    let row = json!({"bits": 2, "group_size": -1, "lm_head": true});
    assert_eq!(wording(with(&gptq(), row.clone()), Q), "gptq v1 2-bit per row sym");
    assert_eq!(wording(with(&gptq(), row), "lm_head"), "gptq v1 2-bit per row sym");
    let Some(Packing::Gptq { act_order, .. }) =
        read(with(&gptq(), json!({"desc_act": true}))).unwrap().packing(Q).unwrap()
    else {
        panic!()
    };
    assert!(act_order);
}

#[test]
fn gptq_overrides_by_module() {
    let dynamic = json!({"dynamic": {
        "-:.*\\.layers\\.11\\..*": {},
        "+:model\\.layers\\.0\\..*q_proj": {"bits": 8, "group_size": 32, "mse": 2.4},
        "model.layers.0": {"bits": 3},
        "lm_head": {"bits": 8, "sym": false}
    }});
    let config = with(&gptq(), dynamic);
    assert_eq!(wording(config.clone(), DOWN), "floats");
    assert_eq!(wording(config.clone(), Q), "gptq v1 8-bit g32 sym", "the first match counts");
    assert_eq!(wording(config.clone(), "model.layers.0.mlp.up_proj"), "gptq v1 3-bit g128 sym");
    assert_eq!(wording(config.clone(), "model.layers.1.mlp.up_proj"), "gptq v1 4-bit g128 sym");
    assert_eq!(wording(config.clone(), "lm_head"), "gptq v1 8-bit g128 asym");
    let inside = with(&gptq(), json!({"dynamic": {"layers": {"bits": 8}}}));
    assert_eq!(wording(inside, Q), "gptq v1 4-bit g128 sym", "matches start at the first letter");
    let only = json!({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.up_proj"]]});
    let only = with(&gptq(), only);
    assert_eq!(wording(only.clone(), Q), "gptq v1 4-bit g128 sym");
    assert_eq!(wording(only, DOWN), "floats");
}

#[test]
fn gptq_that_cannot_load_is_refused() {
    let refused = |extra: Value, key: &str| {
        refused(with(&gptq(), extra), &format!("quantization_config.{key}"));
    };
    refused(json!({"bits": 5}), "bits");
    refused(json!({"bits": "4"}), "bits");
    refused(json!({"bits": null}), "bits");
    refused(json!({"group_size": 0}), "group_size");
    refused(json!({"group_size": -2}), "group_size");
    refused(json!({"group_size": 1e30}), "group_size");
    refused(json!({"checkpoint_format": "marlin"}), "checkpoint_format");
    refused(json!({"checkpoint_format": "gptq", "format": "gptq_v2"}), "format");
    refused(json!({"is_marlin_format": true}), "is_marlin_format");
    refused(json!({"adapter": {"rank": 32}}), "adapter");
    refused(json!({"pack_dtype": "int16"}), "pack_dtype");
    refused(json!({"act_bits": 8}), "act_bits");
    refused(json!({"data_type": "fp"}), "data_type");
    refused(json!({"future_key": 1}), "future_key");
    refused(json!({"method": "awq"}), "method");
    refused(json!({"dynamic": {"a": {"future": 1}}}), "dynamic.a.future");
    refused(json!({"dynamic": {"a": {"bits": 5}}}), "dynamic.a.bits");
    refused(json!({"modules_in_block_to_quantize": [[1]]}), "modules_in_block_to_quantize");
    refused(json!({"quant_method": "bitsandbytes"}), "quant_method");
    refused(json!({"quant_method": null}), "quant_method");
}

#[test]
fn bad_and_runaway_patterns_are_errors() {
    refused(with(&gptq(), json!({"dynamic": {"(": {}}})), "quantization_config.dynamic");
    // Backtracks for ever without a limit: nested repetition that cannot match.
    let runaway = "(?=(a|a)*)(model|mode|m)*(?:(.+)+)+\\1\\2zz$";
    let config = with(&gptq(), json!({ "dynamic": { runaway: {} } }));
    let found = read(config).unwrap().packing(&"model.".repeat(30));
    assert!(matches!(found, Err(Error::Config { .. }) | Ok(Some(_))), "{found:?}");
}

#[test]
fn awq_in_all_spellings() {
    assert_eq!(wording(awq(), Q), "awq gemm 4-bit g128 asym");
    assert_eq!(wording(awq(), "lm_head"), "floats");
    let own = json!({"zero_point": true, "q_group_size": 64, "w_bit": 4, "version": "GEMM",
        "quant_method": "awq"});
    assert_eq!(wording(own, Q), "awq gemm 4-bit g64 asym");
    let skipping = with(&awq(), json!({"modules_to_not_convert": ["self_attn"]}));
    assert_eq!(wording(skipping.clone(), Q), "floats");
    assert_eq!(wording(skipping, DOWN), "awq gemm 4-bit g128 asym");
    let dynamic = with(&awq(), json!({"dynamic": {"-:.*q_proj": {}}, "lm_head": true}));
    assert_eq!(wording(dynamic.clone(), Q), "floats");
    assert_eq!(wording(dynamic, "lm_head"), "awq gemm 4-bit g128 asym");
    for (extra, key) in [
        (json!({"version": "gemv"}), "version"),
        (json!({"version": "gemv_fast"}), "version"),
        (json!({"bits": 8}), "bits"),
        (json!({"backend": "llm-awq"}), "backend"),
        (json!({"checkpoint_format": "marlin"}), "checkpoint_format"),
        (json!({"group_size": null}), "group_size"),
        (json!({"modules_to_not_convert": "lm_head"}), "modules_to_not_convert"),
        (json!({"x": 1}), "x"),
    ] {
        refused(with(&awq(), extra), &format!("quantization_config.{key}"));
    }
}

#[test]
fn auto_round_says_whose_packing_it_writes() {
    let base = json!({"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": false,
        "autoround_version": "0.16.1", "iters": 50, "data_type": "int", "act_bits": 16,
        "block_name_to_quantize": "model.layers"});
    let format = |f: &str| with(&base, json!({ "packing_format": f }));
    assert_eq!(wording(base.clone(), Q), "gptq v1 4-bit g32 asym");
    assert_eq!(wording(format("auto_round:auto_gptq"), Q), "gptq v1 4-bit g32 asym");
    assert_eq!(wording(format("auto_round:gptqmodel"), Q), "gptq v2 4-bit g32 asym");
    assert_eq!(wording(format("auto_round"), Q), "gptq v2 4-bit g32 asym");
    assert_eq!(wording(format("auto_round:auto_awq"), Q), "awq gemm 4-bit g32 asym");
    refused(format("auto_round:fp8"), "quantization_config.packing_format");
    refused(format("auto_round:llm_compressor"), "quantization_config.packing_format");
    let old = with(&base, json!({"backend": "auto_round:exllamav2"}));
    refused(old, "quantization_config.backend");
    refused(with(&base, json!({"act_bits": 8})), "quantization_config.act_bits");
    let extra = with(
        &base,
        json!({"extra_config": {
            "model.layers.0.self_attn.q_proj": {"bits": 16, "data_type": "fp"},
            "layers\\.11\\..*": {"bits": 8, "act_bits": 16},
            "lm_head": {"bits": 4, "group_size": 128}
        }}),
    );
    assert_eq!(wording(extra.clone(), Q), "floats");
    assert_eq!(wording(extra.clone(), DOWN), "gptq v1 8-bit g32 asym");
    assert_eq!(wording(extra, "lm_head"), "gptq v1 4-bit g128 asym");
}

#[test]
fn compressed_tensors_groups_and_targets() {
    assert_eq!(wording(compressed(json!({})), Q), "compressed-tensors 4-bit g128 sym");
    assert_eq!(wording(compressed(json!({})), "lm_head"), "floats");
    let channel = json!({"strategy": "channel", "group_size": null, "num_bits": 8});
    assert_eq!(wording(compressed(channel), Q), "compressed-tensors 8-bit per row sym");
    let minus = json!({"strategy": "channel", "group_size": -1, "symmetric": false});
    assert_eq!(wording(compressed(minus), Q), "compressed-tensors 4-bit per row asym");
    let mut two = compressed(json!({}));
    two["ignore"] = json!(["re:.*mlp.*"]);
    let mut exact = two["config_groups"]["group_0"].clone();
    exact["targets"] = json!([Q, "re:model\\.layers\\.1\\..*"]);
    exact["weights"]["num_bits"] = json!(8);
    two["config_groups"]["group_1"] = exact;
    assert_eq!(wording(two.clone(), Q), "compressed-tensors 8-bit g128 sym");
    assert_eq!(
        wording(two.clone(), "model.layers.1.self_attn.k_proj"),
        "compressed-tensors 8-bit g128 sym"
    );
    assert_eq!(
        wording(two.clone(), "model.layers.2.self_attn.k_proj"),
        "compressed-tensors 4-bit g128 sym"
    );
    assert_eq!(wording(two, DOWN), "floats");
}

#[test]
fn compressed_tensors_that_cannot_load_are_refused() {
    let top = |extra: Value, key: &str| {
        refused(with(&compressed(json!({})), extra), &format!("quantization_config.{key}"));
    };
    top(json!({"format": "float-quantized"}), "format");
    top(json!({"format": "marlin-24"}), "format");
    top(json!({"kv_cache_scheme": {"num_bits": 8}}), "kv_cache_scheme");
    top(json!({"transform_config": {"config_groups": {}}}), "transform_config");
    top(json!({"sparsity_config": {"format": "sparse-24-bitmask"}}), "sparsity_config");
    top(json!({"quantization_status": "calibration"}), "quantization_status");
    top(json!({"ignore": ["re:("]}), "ignore");
    top(json!({"config_groups": {}}), "config_groups");
    top(json!({"future": true}), "future");
    let group = "config_groups.group_0";
    let weights = |extra: Value, key: &str| {
        refused(compressed(extra), &format!("quantization_config.{group}.weights.{key}"));
    };
    weights(json!({"num_bits": 3}), "num_bits");
    weights(json!({"type": "float"}), "type");
    weights(json!({"strategy": "tensor"}), "strategy");
    weights(json!({"group_size": null}), "group_size");
    weights(json!({"strategy": "channel"}), "group_size");
    weights(json!({"dynamic": true}), "dynamic");
    weights(json!({"actorder": "sometimes"}), "actorder");
    weights(json!({"block_structure": [128, 128]}), "block_structure");
    weights(json!({"future": 1}), "future");
    let mut quantized_input = compressed(json!({}));
    quantized_input["config_groups"]["group_0"]["input_activations"] = json!({"num_bits": 8});
    refused(quantized_input, &format!("quantization_config.{group}.input_activations"));
    let dense = json!({"sparsity_config": {"format": "dense"}});
    assert!(read(with(&compressed(json!({})), dense)).is_ok());
}

#[test]
fn settings_may_lie_in_a_file_of_their_own() {
    let find = |name: &str, text: &str| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(name), text).unwrap();
        let files = ModelFiles::Folder(dir.path().to_owned());
        let config = Reader::new(PathBuf::from("config.json"), serde_json::Map::new());
        let found = Quantization::read(&files, &config)?.packing(Q)?;
        Ok::<_, Error>(found.map_or("floats".to_owned(), |p| p.to_string()))
    };
    let gptq = r#"{"bits": 4, "group_size": 128, "desc_act": true, "sym": true}"#;
    assert_eq!(find("quantize_config.json", gptq).unwrap(), "gptq v1 4-bit g128 sym");
    let awq = r#"{"zero_point": true, "q_group_size": 128, "w_bit": 4, "version": "GEMM"}"#;
    assert_eq!(find("quant_config.json", awq).unwrap(), "awq gemm 4-bit g128 asym");
    let err = find("quantization_config.json", gptq).unwrap_err();
    assert!(matches!(&err, Error::Config { key, .. } if key == "quant_method"), "{err}");
    assert_eq!(find("other.json", gptq).unwrap(), "floats");
    assert!(matches!(find("quantize_config.json", "{"), Err(Error::Json { .. })));
}

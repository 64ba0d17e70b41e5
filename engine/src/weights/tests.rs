//! Small Llama checkpoints made here: how tensors become weights, and what is refused.

use super::*;
use crate::files::ModelFiles;
use crate::model::{Head, Model, ModelOptions};
use kernels::program::Op;
use quant::Bits;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use testkit::{Rng, Tensor};

type Tensors = BTreeMap<String, Tensor>;

const LAYER: &str = "model.layers.0.";

/// Two heads of four columns, one KV head, one layer.
fn config() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 6, "num_hidden_layers": 1, "vocab_size": 5,
        "max_position_embeddings": 32, "tie_word_embeddings": false})
}

fn random(shape: &[usize], seed: u64) -> Tensor {
    let values = Rng::new(seed).floats(shape.iter().product(), 1.0);
    Tensor::f16(shape, &values)
}

/// All tensors of [`config`], f16.
fn tensors() -> Tensors {
    let shapes: &[(&str, &[usize])] = &[
        ("model.embed_tokens.weight", &[5, 8]),
        ("model.layers.0.input_layernorm.weight", &[8]),
        ("model.layers.0.self_attn.q_proj.weight", &[8, 8]),
        ("model.layers.0.self_attn.k_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.v_proj.weight", &[4, 8]),
        ("model.layers.0.self_attn.o_proj.weight", &[8, 8]),
        ("model.layers.0.post_attention_layernorm.weight", &[8]),
        ("model.layers.0.mlp.gate_proj.weight", &[6, 8]),
        ("model.layers.0.mlp.up_proj.weight", &[6, 8]),
        ("model.layers.0.mlp.down_proj.weight", &[8, 6]),
        ("model.norm.weight", &[8]),
        ("lm_head.weight", &[5, 8]),
    ];
    let numbered = shapes.iter().enumerate();
    numbered.map(|(i, (name, shape))| ((*name).to_owned(), random(shape, i as u64))).collect()
}

fn open(config: &Value, tensors: &Tensors) -> Result<Model, Error> {
    open_with(config, tensors, Head::Keep)
}

fn open_with(config: &Value, tensors: &Tensors, head: Head) -> Result<Model, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    testkit::write_tensors(&dir.path().join("model.safetensors"), tensors);
    // On the systems this is tested on, mapped files outlive their names.
    Model::open_with(
        ModelFiles::Folder(dir.path().to_owned()),
        &ModelOptions { head, ..ModelOptions::default() },
    )
}

fn with(edit: impl FnOnce(&mut Value, &mut Tensors)) -> Result<Model, Error> {
    let (mut config, mut tensors) = (config(), tensors());
    edit(&mut config, &mut tensors);
    open(&config, &tensors)
}

fn widened(tensor: &Tensor) -> Tensor {
    Tensor::f32(&tensor.shape, &tensor.to_f32())
}

/// The declared weights whose label contains `part`.
fn labels(model: &Model, part: &str) -> Vec<String> {
    let all = model.program().weights.iter().map(|w| w.label.clone());
    all.filter(|l| l.contains(part)).collect()
}

/// All rows of weight `id`.
fn whole(model: &Model, id: usize) -> Result<Weight<'_>, kernels::Error> {
    let [n, _] = model.program().weights[id].shape;
    model.weights().make(WeightId(id as u32), &(0..n))
}

/// The values of the weight called `label`.
fn values(model: &Model, label: &str) -> Vec<f32> {
    let id = model.program().weights.iter().position(|w| w.label == label).unwrap();
    let Weight::Dense(dense) = whole(model, id).unwrap() else { panic!() };
    dense.to_f32()
}

fn row_major(tensors: &Tensors, names: &[&str]) -> Vec<f32> {
    names.iter().flat_map(|n| tensors[&format!("{LAYER}{n}")].to_f32()).collect()
}

#[test]
fn equal_formats_become_one_matrix() {
    let (model, all) = (with(|_, _| ()).unwrap(), tensors());
    kernels::validate::program(model.program()).unwrap();
    let parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
    let parts = parts.map(|p| format!("{p}.weight"));
    let expected = row_major(&all, &parts.each_ref().map(String::as_str));
    assert_eq!(values(&model, "layers.0.attn.qkv"), expected);
    let expected = row_major(&all, &["mlp.gate_proj.weight", "mlp.up_proj.weight"]);
    assert_eq!(values(&model, "layers.0.mlp.gate_up"), expected);
    assert_eq!(values(&model, "head"), all["lm_head.weight"].to_f32());
    assert_eq!(values(&model, "layers.0.mlp.norm").len(), 8);
    let names: Vec<&str> = model.modules().iter().map(|m| m.name.as_str()).collect();
    assert_eq!(names.len(), 9, "{names:?}");
    let down = model.modules().iter().find(|m| m.name.contains("down_proj")).unwrap();
    assert_eq!((down.shape, down.source.as_str()), ([8, 6], "f16"));
}

#[test]
fn weights_can_be_loaded_again_after_their_pages_went() {
    let model = with(|_, _| ()).unwrap();
    let weights = model.weights();
    let first = weights.load(WeightId(0), 0..5).unwrap().shape();
    weights.release(WeightId(0));
    let Weight::Dense(again) = weights.load(WeightId(0), 0..5).unwrap() else { panic!() };
    assert_eq!(again.shape(), first);
    assert_eq!(again.to_f32(), tensors()["model.embed_tokens.weight"].to_f32());
}

#[test]
fn mixed_types_stay_apart() {
    let name = format!("{LAYER}self_attn.k_proj.weight");
    let model = with(|_, t| {
        let wide = widened(&t[&name]);
        t.insert(name.clone(), wide);
    })
    .unwrap();
    kernels::validate::program(model.program()).unwrap();
    let found = labels(&model, "layers.0.attn.");
    let apart = ["norm", "q", "k", "v", "out"].map(|l| format!("layers.0.attn.{l}"));
    assert_eq!(found.iter().filter(|l| apart.contains(l)).count(), 5, "{found:?}");
    assert_eq!(values(&model, "layers.0.attn.k"), tensors()[&name].to_f32());
    let views = model.program().steps.iter().filter_map(|s| match s.op {
        Op::Linear { out, .. } if s.label.starts_with("layers.0.attn.") => Some(out.start),
        _ => None,
    });
    assert_eq!(views.collect::<Vec<_>>(), [0, 8, 12, 0]);
}

#[test]
fn biases_of_mixed_types_meet_in_f32() {
    let q = Tensor::f32(&[8], &[0.1; 8]);
    let (k, v) = (Tensor::f16(&[4], &[0.5; 4]), Tensor::f16(&[4], &[-0.25; 4]));
    let model = with(|c, t| {
        c["attention_bias"] = json!(true);
        let biases = [("q", q), ("k", k), ("v", v), ("o", Tensor::f16(&[8], &[1.0; 8]))];
        t.extend(biases.map(|(name, b)| (format!("{LAYER}self_attn.{name}_proj.bias"), b)));
    })
    .unwrap();
    kernels::validate::program(model.program()).unwrap();
    let expected = [&[0.1; 8][..], &[0.5; 4], &[-0.25; 4]].concat();
    assert_eq!(values(&model, "layers.0.attn.qkv.bias"), expected);
    assert_eq!(values(&model, "layers.0.attn.out.bias"), [1.0; 8]);
}

#[test]
fn tied_heads_in_every_way_they_are_stored() {
    let tied = |edit: &dyn Fn(&mut Tensors)| {
        with(|c, t| {
            c["tie_word_embeddings"] = json!(true);
            edit(t);
        })
    };
    let shares = |model: &Model| labels(model, "head").is_empty() && model.spec().tied_head;
    let embed = tensors()["model.embed_tokens.weight"].clone();
    let head_only = |t: &mut Tensors| {
        t.remove("model.embed_tokens.weight");
    };
    let model = tied(&head_only).unwrap();
    assert!(shares(&model));
    assert_eq!(values(&model, "embed"), tensors()["lm_head.weight"].to_f32());
    let model = tied(&|t| {
        t.remove("lm_head.weight");
    });
    assert!(shares(&model.unwrap()));
    let model = tied(&|t| {
        t.insert("lm_head.weight".to_owned(), embed.clone());
    });
    assert!(shares(&model.unwrap()), "an equal copy is the same matrix");
    let model = tied(&|_| ()).unwrap();
    assert!(!shares(&model), "different matrices are both used");
    assert_eq!(values(&model, "head"), tensors()["lm_head.weight"].to_f32());
    let err = with(|_, t| head_only(t)).unwrap_err();
    assert!(matches!(&err, Error::Tensor { tensor, .. } if tensor == "model.embed_tokens.weight"));
    let untied = |t: &mut Tensors| t.remove("lm_head.weight");
    let err = with(|_, t| drop(untied(t))).unwrap_err();
    assert!(matches!(&err, Error::Tensor { tensor, .. } if tensor == "lm_head.weight"), "{err}");
}

const INT8: Format = Format::Grouped { bits: Bits::Eight, group: 8, act_order: false };

/// The weight called `label`, with its id.
fn loaded<'a>(model: &Model, weights: &'a ModelWeights<'_>, label: &str) -> Weight<'a> {
    let id = model.program().weights.iter().position(|w| w.label == label).unwrap();
    let rows = 0..model.program().weights[id].shape[0];
    weights.load(WeightId(id as u32), rows).unwrap()
}

#[test]
fn float_heads_become_int8_on_demand() {
    let (config, all) = (config(), tensors());
    let model = open_with(&config, &all, Head::Int8).unwrap();
    kernels::validate::program(model.program()).unwrap();
    let weights = model.weights();
    let head = loaded(&model, &weights, "head");
    assert_eq!(head.format(), INT8);
    for (row, w_k) in all["lm_head.weight"].to_f32().chunks_exact(8).enumerate() {
        let found = quant::reference::row(&head, row);
        // Half of a step of 1/127 of the greatest weight, which is below 1.
        assert!(found.iter().zip(w_k).all(|(f, w)| (f - w).abs() <= 0.51 / 127.0), "{row}");
    }
    let info = model.modules().iter().find(|m| m.name == "lm_head.weight").unwrap();
    assert_eq!((info.format, info.source.as_str()), (INT8, "f16, rounded to w8g8"));
    let kept = open_with(&config, &all, Head::Auto).unwrap();
    assert_eq!(values(&kept, "head"), all["lm_head.weight"].to_f32(), "no layer is quantized");
}

#[test]
fn a_tied_head_in_int8_leaves_the_embedding_alone() {
    let (mut config, mut all) = (config(), tensors());
    config["tie_word_embeddings"] = json!(true);
    all.remove("lm_head.weight");
    let model = open_with(&config, &all, Head::Int8).unwrap();
    kernels::validate::program(model.program()).unwrap();
    assert!(model.spec().tied_head, "the specification says what the files have");
    assert_eq!(values(&model, "embed"), all["model.embed_tokens.weight"].to_f32());
    assert_eq!(loaded(&model, &model.weights(), "head").format(), INT8);
    let [float, int8] = [Head::Keep, Head::Int8]
        .map(|head| open_with(&config, &all, head).unwrap().program().bytes_per_token());
    assert_eq!(float - int8, 5 * (2 * 8 - (8 + 2)), "codes and a scale in place of floats");
}

#[test]
fn a_head_that_is_not_finite_has_no_codes() {
    let mut all = tensors();
    let mut values = all["lm_head.weight"].to_f32();
    values[9] = f32::NAN;
    all.insert("lm_head.weight".to_owned(), Tensor::f32(&[5, 8], &values));
    let model = open_with(&config(), &all, Head::Int8).unwrap();
    let head = model.program().weights.len() - 1;
    for rows in [0..5, 1..3] {
        let refused = model.weights().load(WeightId(head as u32), rows).unwrap_err();
        let source = std::error::Error::source(&refused).unwrap().to_string();
        assert!(source.contains("lm_head.weight") && source.contains("index 9 is NaN"), "{source}");
    }
}

#[test]
fn a_bare_model_has_no_prefix() {
    let model = with(|c, t| {
        c["architectures"] = json!(["LlamaModel"]);
        c["tie_word_embeddings"] = json!(true);
        t.remove("lm_head.weight");
        let bare = |(name, tensor): (String, Tensor)| (name.replace("model.", ""), tensor);
        *t = std::mem::take(t).into_iter().map(bare).collect();
    });
    kernels::validate::program(model.unwrap().program()).unwrap();
}

#[test]
fn unused_tensors_are_named() {
    let err = with(|_, t| {
        for i in 0..12 {
            t.insert(format!("extra.{i:02}"), Tensor::f32(&[1], &[1.0]));
        }
        let inv_freq = format!("{LAYER}self_attn.rotary_emb.inv_freq");
        t.insert(inv_freq, Tensor::f32(&[2], &[1.0, 0.1]));
    })
    .unwrap_err();
    let Error::UnusedTensors { count, first, .. } = &err else { panic!("{err}") };
    assert_eq!(*count, 12);
    assert!(first.starts_with("extra.00, ") && first.ends_with("extra.09"), "{first}");
    let bias = |_: &mut Value, t: &mut Tensors| {
        t.insert(format!("{LAYER}self_attn.q_proj.bias"), Tensor::f16(&[8], &[0.0; 8]));
    };
    assert!(matches!(with(bias), Err(Error::UnusedTensors { count: 1, .. })), "floats have none");
}

#[test]
fn missing_and_misshapen_tensors_are_named() {
    let changed = |name: &str, tensor: Option<Tensor>| {
        let name = format!("{LAYER}{name}");
        let err = with(|_, t| match tensor {
            Some(tensor) => drop(t.insert(name.clone(), tensor)),
            None => drop(t.remove(&name)),
        });
        match err.unwrap_err() {
            Error::Tensor { tensor, expected, found, .. } => {
                assert_eq!(tensor, name);
                format!("{expected}; {found}")
            }
            other => panic!("{other}"),
        }
    };
    let dense = "[8, 8] of f32, f16 or bf16";
    assert_eq!(changed("self_attn.o_proj.weight", None), format!("{dense}; no such tensor"));
    let f16 = |shape: &[usize]| Some(random(shape, 1));
    assert_eq!(changed("self_attn.o_proj.weight", f16(&[8, 9])), format!("{dense}; [8, 9] of F16"));
    assert_eq!(changed("self_attn.o_proj.weight", f16(&[64])), format!("{dense}; [64] of F16"));
    let ints = Tensor::i32(&[8, 8], &[1; 64]);
    assert_eq!(changed("self_attn.o_proj.weight", Some(ints)), format!("{dense}; [8, 8] of I32"));
    let norm = changed("input_layernorm.weight", f16(&[1, 8]));
    assert_eq!(norm, "[8] of f32, f16 or bf16; [1, 8] of F16");
}

/// A copy of a golden case whose tensors and configuration were changed.
fn golden(case: &str, edit: impl FnOnce(&mut Value, &mut Tensors)) -> Result<Model, Error> {
    let dir = testkit::golden("quantized").join(case);
    let mut config = testkit::read_json(&dir.join("config.json"));
    let mut tensors = testkit::read_tensors(&dir.join("model.safetensors"));
    edit(&mut config, &mut tensors);
    open(&config, &tensors)
}

/// Loads every weight; the first error as text with its causes.
fn load(model: &Model) -> Result<(), String> {
    for i in 0..model.program().weights.len() {
        if let Err(err) = whole(model, i) {
            let kernels::Error::Source { label, source } = err else { panic!("{err}") };
            return Err(format!("{label}: {source}"));
        }
    }
    Ok(())
}

#[test]
fn quantized_rows_are_those_of_the_reference_tool() {
    for case in testkit::golden_cases("quantized") {
        let model = golden(&case, |_, _| ()).unwrap();
        let dir = testkit::golden("quantized").join(&case);
        let expected = testkit::read_tensors(&dir.join("expected.safetensors"));
        // Rows 0, 1 and last of each module; fused ones begin where the ones before end.
        let fused = [
            ("attn.qkv", ["q", "k", "v"].as_slice(), "self_attn."),
            ("attn.out", &["o"], "self_attn."),
            ("mlp.down", &["down"], "mlp."),
        ];
        for (label, parts, block) in fused {
            let label = format!("layers.0.{label}");
            let id = model.program().weights.iter().position(|w| w.label == label).unwrap();
            let weight = whole(&model, id).unwrap();
            let mut start = 0;
            for part in parts {
                let name = format!("{LAYER}{block}{part}_proj");
                let want = &expected[&format!("dequant.{name}")];
                let module = model.modules().iter().find(|m| m.name == name).unwrap();
                let n = module.shape[0];
                let rows = [start, start + 1, start + n - 1];
                let found: Vec<f32> =
                    rows.iter().flat_map(|r| quant::reference::row(&weight, *r)).collect();
                for (f, w) in found.iter().zip(want.to_f32()) {
                    // One rounding of a product in f32.
                    assert!((f - w).abs() <= 1e-6 * w.abs(), "{case} {name}: {f} {w}");
                }
                start += n;
            }
        }
    }
}

#[test]
fn rows_are_the_same_in_parts_and_as_a_whole() {
    for case in testkit::golden_cases("quantized") {
        let model = golden(&case, |_, _| ()).unwrap();
        for (id, decl) in model.program().weights.iter().enumerate() {
            let all = whole(&model, id).unwrap();
            // Parts of 100 rows end inside and cross the modules of a fused weight.
            for start in (0..decl.shape[0]).step_by(100) {
                let rows = start..decl.shape[0].min(start + 100);
                let part = model.weights().make(WeightId(id as u32), &rows).unwrap();
                match (part, all.rows(rows)) {
                    (Weight::Grouped(a), Weight::Grouped(b)) => assert_eq!(a, b, "{case} {decl:?}"),
                    (Weight::Dense(a), Weight::Dense(b)) => assert_eq!(a, b, "{case} {decl:?}"),
                    (a, b) => panic!("{a:?} {b:?}"),
                }
            }
        }
    }
}

#[test]
fn other_column_orders_stay_apart() {
    let case = "gptq_llama_w4g128_actorder";
    let model = golden(case, |_, _| ()).unwrap();
    assert_eq!(labels(&model, "layers.0.attn.qkv").len(), 1);
    let down = model.modules().iter().find(|m| m.name.ends_with("0.mlp.down_proj")).unwrap();
    assert_eq!(down.source, "gptq v1 4-bit g128 sym act-order");
    let plain = golden("gptq_llama_w4g128", |_, _| ()).unwrap();
    let down = plain.modules().iter().find(|m| m.name.ends_with("0.mlp.down_proj")).unwrap();
    assert_eq!(down.source, "gptq v1 4-bit g128 sym", "ascending indices are no order");
    // Two groups, so that the order of k differs from that of q.
    let model = golden("ct_old_llama_w4a16_g128_actorder_group", |_, t| {
        let g_idx = t.get_mut("model.layers.0.self_attn.k_proj.weight_g_idx").unwrap();
        let mut order = g_idx.to_i32();
        let other = order.iter().position(|g| *g != order[0]).unwrap();
        order.swap(0, other);
        *g_idx = Tensor::i32(&g_idx.shape.clone(), &order);
    })
    .unwrap();
    assert_eq!(labels(&model, "layers.0.attn.qkv").len(), 0);
    load(&model).unwrap();
}

#[test]
fn configuration_and_tensors_must_agree() {
    let tensor = |found: Result<Model, Error>| match found.unwrap_err() {
        Error::Tensor { tensor, found, .. } => format!("{tensor}: {found}"),
        other => panic!("{other}"),
    };
    let q = format!("{LAYER}self_attn.q_proj");
    let dense = with(|c, _| {
        c["quantization_config"] =
            json!({"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": false});
    });
    assert_eq!(tensor(dense), format!("{q}.qweight: no such tensor, but {q}.weight"));
    let forgotten = golden("gptq_llama_w4g128", |c, _| {
        c.as_object_mut().unwrap().remove("quantization_config");
    });
    assert_eq!(tensor(forgotten), format!("{q}.weight: no such tensor, but {q}.qweight"));
    let other = golden("ct_llama_w4a16_g128", |c, _| {
        c["quantization_config"] =
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": false});
    });
    assert_eq!(tensor(other), format!("{q}.qweight: no such tensor, but {q}.weight_packed"));
    let unordered = golden("gptq_llama_w4g128_actorder", |_, t| {
        t.remove(&format!("{q}.g_idx"));
    });
    assert_eq!(tensor(unordered), format!("{q}.g_idx: no such tensor, but {q}.qweight"));
    let asymmetric = golden("ct_llama_w4a16_g128", |c, _| {
        c["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = json!(false);
    });
    assert!(tensor(asymmetric).contains(".weight_zero_point: no such tensor"));
    let group = golden("gptq_llama_w4g128", |c, _| {
        c["quantization_config"]["group_size"] = json!(3);
    });
    assert!(tensor(group).starts_with(&format!("{q}: group_size")));
}

#[test]
fn a_module_left_unquantized_loads_as_floats() {
    let name = format!("{LAYER}mlp.down_proj");
    let model = golden("gptq_llama_w4g128", |c, t| {
        t.retain(|n, _| !n.starts_with(&name));
        t.insert(format!("{name}.weight"), random(&[256, 384], 3));
        c["quantization_config"]["dynamic"] = json!({"-:model\\.layers\\.0\\.mlp\\.down_proj": {}});
    })
    .unwrap();
    kernels::validate::program(model.program()).unwrap();
    load(&model).unwrap();
    let down = model.modules().iter().find(|m| m.name.contains("0.mlp.down_proj")).unwrap();
    assert_eq!(down.source, "f16");
}

#[test]
fn zero_biases_of_early_packers_mean_nothing() {
    let name = format!("{LAYER}self_attn.o_proj.bias");
    let zero = golden("gptq_llama_w4g128", |_, t| {
        t.insert(name.clone(), Tensor::f16(&[256], &[0.0; 256]));
    });
    assert!(zero.is_ok());
    let other = golden("gptq_llama_w4g128", |_, t| {
        t.insert(name.clone(), Tensor::f16(&[256], &[0.5; 256]));
    });
    assert!(matches!(&other, Err(Error::UnusedTensors { first, .. }) if *first == name));
}

#[test]
fn bad_values_inside_weights_are_named_at_load() {
    let name = format!("{LAYER}self_attn.k_proj.scales");
    let model = golden("gptq_llama_w4g128", |_, t| {
        let scales = t.get_mut(&name).unwrap();
        let mut values = scales.to_f32();
        values[5] = f32::NAN;
        *scales = Tensor::f16(&scales.shape.clone(), &values);
    });
    let err = load(&model.unwrap()).unwrap_err();
    assert!(err.starts_with("layers.0.attn.qkv: "), "{err}");
    assert!(err.contains(Path::new("model.safetensors").to_str().unwrap()), "{err}");
    assert!(err.contains(&name) && err.contains("NaN"), "{err}");
    let model = golden("gptq_llama_w4g128", |_, t| {
        let qweight = t.get_mut(&format!("{LAYER}mlp.up_proj.qweight")).unwrap();
        qweight.shape.reverse();
    });
    let err = load(&model.unwrap()).unwrap_err();
    assert!(err.contains("mlp.up_proj.qweight: expected shape"), "{err}");
}

//! Texts that ask for self-drafts, and small checkpoints opened as drafts of themselves.

use super::*;
use crate::Error;
use crate::files::ModelFiles;
use crate::model::Model;
use kernels::WeightSource;
use kernels::program::WeightId;
use quant::{Format, Weight};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use testkit::{Rng, Tensor};

#[test]
fn settings_come_alone_or_together() {
    let parse = |text: &str| text.parse::<SelfDraft>().unwrap();
    let (four, eight) = (Some(Bits::Four), Some(Bits::Eight));
    assert_eq!(parse("layers=4"), SelfDraft { layers: Some(4), bits: None });
    assert_eq!(parse("bits=8"), SelfDraft { layers: None, bits: eight });
    let both = SelfDraft { layers: Some(12), bits: four };
    assert_eq!(parse("layers=12,bits=4"), both);
    assert_eq!(parse("bits=4,layers=12"), both);
    let options = both.options(Head::Int8);
    assert_eq!(options, ModelOptions { head: Head::Int8, layers: Some(12), bits: four });
}

#[test]
fn other_texts_are_refused_with_the_reason() {
    for (text, reason) in [
        ("", r#""" is no setting"#),
        ("layer=4", r#""layer=4" is no setting"#),
        ("layers=4,", r#""" is no setting"#),
        ("layers=4 ,bits=4", r#"layers is "4 ", expected a number from 1"#),
        ("layers", r#"layers is "", expected"#),
        ("layers=0", r#"layers is "0", expected"#),
        ("layers=-1", r#"layers is "-1", expected"#),
        ("layers=99999999999999999999", "expected a number from 1"),
        ("layers=2,layers=3", "layers is given twice"),
        ("bits=4,bits=4", "bits is given twice"),
        ("bits=16", r#"bits is "16", expected 4 or 8"#),
        ("bits=3", "kept in four bits"),
    ] {
        let error = text.parse::<SelfDraft>().unwrap_err().to_string();
        assert!(error.contains(reason) && error.contains("write layers=N"), "{error}");
    }
}

#[test]
fn kept_layers_spread_from_the_first_to_the_last() {
    assert_eq!(kept_layers(6, 1), [0]);
    assert_eq!(kept_layers(6, 2), [0, 5]);
    assert_eq!(kept_layers(6, 3), [0, 3, 5]);
    assert_eq!(kept_layers(6, 4), [0, 2, 3, 5]);
    assert_eq!(kept_layers(6, 5), [0, 1, 3, 4, 5]);
    for all in 1..40 {
        assert_eq!(kept_layers(all, all), (0..all).collect::<Vec<_>>());
        for kept in 2..=all {
            let layers = kept_layers(all, kept);
            assert!(layers.is_sorted_by(|a, b| a < b), "{layers:?}");
            assert_eq!((layers.len(), layers[0], layers[kept - 1]), (kept, 0, all - 1));
        }
    }
}

type Tensors = BTreeMap<String, Tensor>;

/// Two heads of four columns, one KV head.
fn config(layers: usize) -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 6, "num_hidden_layers": layers,
        "vocab_size": 5, "max_position_embeddings": 32, "tie_word_embeddings": true})
}

/// Tensors of [`config`], f32, all different.
fn tensors(layers: usize) -> Tensors {
    let mut all: Vec<(String, Vec<usize>)> = vec![
        ("model.embed_tokens.weight".to_owned(), vec![5, 8]),
        ("model.norm.weight".to_owned(), vec![8]),
    ];
    for layer in 0..layers {
        let own: [(&str, &[usize]); 9] = [
            ("input_layernorm", &[8]),
            ("self_attn.q_proj", &[8, 8]),
            ("self_attn.k_proj", &[4, 8]),
            ("self_attn.v_proj", &[4, 8]),
            ("self_attn.o_proj", &[8, 8]),
            ("post_attention_layernorm", &[8]),
            ("mlp.gate_proj", &[6, 8]),
            ("mlp.up_proj", &[6, 8]),
            ("mlp.down_proj", &[8, 6]),
        ];
        let named = |(name, shape): (&str, &[usize])| {
            (format!("model.layers.{layer}.{name}.weight"), shape.to_vec())
        };
        all.extend(own.map(named));
    }
    let random = |(seed, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = Rng::new(seed as u64).floats(shape.iter().product(), 1.0);
        (name, Tensor::f32(&shape, &values))
    };
    all.into_iter().enumerate().map(random).collect()
}

fn open(config: &Value, tensors: &Tensors, draft: &str) -> Result<Model, Error> {
    let draft: SelfDraft =
        if draft.is_empty() { SelfDraft::default() } else { draft.parse().unwrap() };
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    testkit::write_tensors(&dir.path().join("model.safetensors"), tensors);
    // On the systems this is tested on, mapped files outlive their names.
    Model::open_with(ModelFiles::Folder(dir.path().to_owned()), &draft.options(Head::Keep))
}

/// All rows of all weights, by label.
fn values(model: &Model) -> BTreeMap<String, Vec<Vec<f32>>> {
    let weights = model.weights();
    let one = |(i, decl): (usize, &kernels::program::WeightDecl)| {
        let n = decl.shape[0];
        let weight = weights.load(WeightId(i as u32), 0..n).unwrap();
        assert_eq!(weight.format(), decl.format, "{}", decl.label);
        (decl.label.clone(), (0..n).map(|row| quant::reference::row(&weight, row)).collect())
    };
    model.program().weights.iter().enumerate().map(one).collect()
}

fn refused(found: Result<Model, Error>) -> String {
    match found.unwrap_err() {
        Error::Choice { option, expected, found, .. } => format!("{option} {found}: {expected}"),
        other => panic!("{other}"),
    }
}

#[test]
fn all_layers_are_the_whole_model() {
    let (config, tensors) = (config(3), tensors(3));
    let [whole, draft] = ["", "layers=3"].map(|d| open(&config, &tensors, d).unwrap());
    assert_eq!(whole.program(), draft.program());
    assert_eq!(whole.spec(), draft.spec());
    assert_eq!(whole.modules(), draft.modules());
    assert_eq!(values(&whole), values(&draft));
}

#[test]
fn fewer_layers_are_a_checkpoint_cut_by_hand() {
    for kept in 1..5 {
        let draft = open(&config(5), &tensors(5), &format!("layers={kept}")).unwrap();
        kernels::validate::program(draft.program()).unwrap();
        let mut cut = tensors(5);
        cut.retain(|name, _| !name.contains(".layers."));
        for (new, old) in kept_layers(5, kept).into_iter().enumerate() {
            let old = format!(".layers.{old}.");
            let own = tensors(5).into_iter().filter(|(name, _)| name.contains(&old));
            cut.extend(own.map(|(name, t)| (name.replace(&old, &format!(".layers.{new}.")), t)));
        }
        let cut = open(&config(kept), &cut, "").unwrap();
        assert_eq!(draft.program(), cut.program());
        assert_eq!(draft.spec(), cut.spec());
        assert_eq!(values(&draft), values(&cut));
        assert_eq!(draft.program().kv.len(), kept);
    }
}

#[test]
fn skipped_layers_are_checked_like_the_others() {
    let skipped = (0..4).find(|i| !kept_layers(4, 2).contains(i)).unwrap();
    let name = format!("model.layers.{skipped}.mlp.up_proj");
    let mut tensors = tensors(4);
    tensors.insert(format!("{name}.bias"), Tensor::f32(&[6], &[1.0; 6]));
    let err = open(&config(4), &tensors, "layers=2").unwrap_err();
    assert!(matches!(&err, Error::UnusedTensors { count: 1, .. }), "{err}");
    tensors.remove(&format!("{name}.bias"));
    tensors.remove(&format!("{name}.weight"));
    let err = open(&config(4), &tensors, "layers=2").unwrap_err();
    assert!(matches!(&err, Error::Tensor { tensor, .. } if tensor.starts_with(&name)), "{err}");
}

#[test]
fn layers_must_be_there() {
    let open = |layers| {
        let dir = testkit::golden("decoders/llama_mha");
        let options = ModelOptions { layers: Some(layers), ..ModelOptions::default() };
        Model::open_with(ModelFiles::Folder(dir), &options)
    };
    let expected = "1 to 2, since the model has 2 layers";
    assert_eq!(refused(open(0)), format!("layers 0: {expected}"));
    assert_eq!(refused(open(3)), format!("layers 3: {expected}"));
    assert_eq!(open(2).unwrap().spec().layers.len(), 2);
}

/// Whether each row of `draft` lies within half a step of `exact`, whose greatest weight of a
/// group of `group` is `steps` steps; f16 scales are rounded up by at most one in a thousand.
fn within_half_a_step(exact: &[f32], draft: &[f32], group: usize, steps: f32) -> bool {
    exact.chunks(group).zip(draft.chunks(group)).all(|(exact, draft)| {
        let step = exact.iter().fold(0.0f32, |a, x| a.max(x.abs())) / steps * 1.001;
        exact.iter().zip(draft).all(|(e, d)| (e - d).abs() <= 0.5001 * step)
    })
}

#[test]
fn fewer_bits_move_weights_by_half_a_step() {
    let whole = open(&config(2), &tensors(2), "").unwrap();
    let exact = values(&whole);
    for (text, steps) in [("bits=8", 127.0), ("bits=4", 7.0)] {
        let draft = open(&config(2), &tensors(2), text).unwrap();
        kernels::validate::program(draft.program()).unwrap();
        assert!(draft.program().bytes_per_token() < whole.program().bytes_per_token());
        let mut rounded = 0;
        for (label, rows) in values(&draft) {
            let linear = ["qkv", "out", "gate_up", "down"].iter().any(|l| label.ends_with(l));
            assert!(linear || rows == exact[&label], "{label} stays as it is");
            rounded += usize::from(linear && rows != exact[&label]);
            for (row, exact) in rows.iter().zip(&exact[&label]) {
                assert!(within_half_a_step(exact, row, row.len(), steps), "{text} {label}");
            }
        }
        assert_eq!(rounded, 8, "four matrices a layer");
        let source =
            &draft.modules().iter().find(|m| m.name.contains("0.mlp.down")).unwrap().source;
        assert!(source.starts_with("f32, rounded to w"), "{source}");
    }
}

/// A golden case as a draft of itself.
fn golden(case: &str, draft: &str) -> Result<Model, Error> {
    let files = ModelFiles::Folder(testkit::golden("quantized").join(case));
    let draft = draft.parse::<SelfDraft>().unwrap();
    Model::open_with(files, &draft.options(Head::Keep))
}

#[test]
fn bits_must_be_fewer_than_the_files() {
    for bits in [4, 8] {
        let found = refused(golden("gptq_llama_w4g128", &format!("bits={bits}")));
        assert_eq!(found, format!("bits {bits}: fewer than the matrices of the layers have"));
    }
}

#[test]
fn eight_bits_become_four_by_rounding_what_they_say() {
    for case in ["gptq_llama_w8g128", "ct_qwen2_w8a16_channel"] {
        assert!(refused(golden(case, "bits=8")).starts_with("bits 8: "));
        let draft = golden(case, "bits=4").unwrap();
        let files = ModelFiles::Folder(testkit::golden("quantized").join(case));
        let whole = Model::open(files).unwrap();
        assert!(draft.program().bytes_per_token() < whole.program().bytes_per_token());
        let (found, exact) = (values(&draft), values(&whole));
        let mut rounded = 0;
        for (i, decl) in draft.program().weights.iter().enumerate() {
            let (rows, exact) = (&found[&decl.label], &exact[&decl.label]);
            let Format::Grouped { group, .. } = decl.format else {
                assert_eq!(rows, exact, "{}", decl.label);
                continue;
            };
            rounded += 1;
            let near = |(a, b): (&Vec<f32>, &Vec<f32>)| within_half_a_step(b, a, group, 7.0);
            assert!(rows.iter().zip(exact).all(near), "{case} {}", decl.label);
            let part = draft.weights();
            let part = part.load(WeightId(i as u32), 3..7).unwrap();
            let Weight::Grouped(_) = &part else { panic!("{}", decl.label) };
            let part: Vec<_> = (0..4).map(|row| quant::reference::row(&part, row)).collect();
            assert_eq!(part, rows[3..7], "{case} {}: a part alone", decl.label);
        }
        assert!(rounded >= 4, "{case}: {rounded}");
    }
}

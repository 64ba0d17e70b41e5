//! Made-up models have the sizes of the real ones and weights that can be run.

use super::*;
use crate::families::shapes::{SHAPES, find};
use crate::forward;
use kernels::Backend;
use kernels::program::TokenId;
use kernels::reference::ReferenceBackend;
use quant::Bits;

fn w4(group: usize) -> Format {
    Format::Grouped { bits: Bits::Four, group, act_order: false }
}

fn model(name: &str, head: Option<Format>) -> SyntheticModel {
    let spec = find(name).unwrap().spec().unwrap();
    SyntheticModel::new(spec, Formats { layers: w4(128), head })
}

/// Elements of all weights, as publishers count them: what they say on their model cards.
#[test]
fn shapes_have_the_published_parameter_counts() {
    let published = [
        ("tinyllama-1.1b", 1_100_048_384),
        ("smollm2-135m", 134_515_008),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.2-3b", 3_212_749_824),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-14b", 14_770_033_664),
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("mistral-7b", 7_248_023_552),
        ("phi-4", 14_659_507_200),
    ];
    assert_eq!(SHAPES.iter().map(|s| s.name).collect::<Vec<_>>(), published.map(|(name, _)| name));
    for (name, count) in published {
        let model = model(name, None);
        let elements: usize = model.program().weights.iter().map(|w| w.shape[0] * w.shape[1]).sum();
        assert_eq!(elements, count, "{name}");
        kernels::validate::program(model.program()).unwrap();
    }
}

#[test]
fn a_quantized_head_is_a_matrix_of_its_own() {
    let eight = Format::Grouped { bits: Bits::Eight, group: 128, act_order: false };
    let (kept, own) = (model("llama-3.2-1b", None), model("llama-3.2-1b", Some(eight)));
    assert_eq!(own.program().weights.len(), kept.program().weights.len() + 1);
    let head = own.program().weights.iter().find(|w| w.label == "head").unwrap();
    assert_eq!((head.shape, head.format), ([128_256, 2048], eight));
    assert_eq!(fitted(w4(128), 576), w4(64), "a group divides the width");
    assert_eq!(fitted(w4(128), 4096), w4(128));
}

#[test]
fn made_up_models_run_and_stay_finite() {
    let mut spec = find("smollm2-135m").unwrap().spec().unwrap();
    (spec.vocab, spec.layers) = (64, spec.layers[..3].to_vec());
    for layers in [w4(128), Format::Dense(FloatType::F16)] {
        let model = SyntheticModel::new(spec.clone(), Formats { layers, head: None });
        let limits = forward::limits(4, 4);
        let build = |model: &SyntheticModel| {
            ReferenceBackend.build(model.program(), &model.weights(), &limits).unwrap()
        };
        let ids = [3, 1, 4, 1].map(TokenId);
        let logits = forward::logits(build(&model).as_mut(), &limits, &ids).unwrap();
        assert!(logits.iter().all(|v| v.is_finite() && v.abs() < 100.0), "{layers}");
        assert!(logits.iter().any(|v| *v != logits[0]), "{layers}: rows differ");
        let again = forward::logits(build(&model).as_mut(), &limits, &ids).unwrap();
        assert_eq!(logits, again, "the same weights each time");
    }
}

#[test]
fn every_float_type_is_of_the_promised_size() {
    for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let format = Format::Dense(float);
        let decl = |label, shape| WeightDecl::new(label, shape, format);
        let decls = [decl("w", [3, 5]), decl("a.norm", [1, 7]), decl("a.bias", [1, 7])];
        let source = MadeUp::new(&decls);
        let values = |i: usize| match source.load(WeightId(i as u32), 0..decls[i].shape[0]).unwrap()
        {
            Weight::Dense(dense) => dense.to_f32(),
            Weight::Grouped(_) => panic!("declared dense"),
        };
        let small = |v: &f32| (1.0 / 64.0..1.0 / 32.0).contains(&v.abs());
        assert!(values(0).iter().all(small), "{float}");
        assert_eq!(values(1), [1.0; 7], "{float}");
        assert!(values(2).iter().all(small), "{float}");
    }
}

#[test]
fn linears_are_copies_of_one_shape() {
    let program = linears(w4(32), [48, 64], Rounding::Fine, 3);
    kernels::validate::program(&program).unwrap();
    let table = EMBEDDING.bytes([1, 64]);
    assert_eq!(program.bytes_per_token(), 3 * w4(32).bytes([48, 64]) + table);
}

#[test]
fn act_order_is_made_where_it_is_declared() {
    for act_order in [false, true] {
        let format = Format::Grouped { bits: Bits::Four, group: 32, act_order };
        let decls = [WeightDecl::new("w", [2, 64], format)];
        let Weight::Grouped(made) = MadeUp::new(&decls).load(WeightId(0), 0..2).unwrap().clone()
        else {
            panic!("declared grouped");
        };
        assert_eq!(made.perm().is_some(), act_order);
        assert!(made.codes()[..32] != made.codes()[32..], "rows differ");
    }
}

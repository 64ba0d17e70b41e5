//! Lowering of small specifications made by hand.

use super::*;
use crate::spec::MlpSpec;
use kernels::program::{Activation, Mask, RopeSpeeds};
use quant::{FloatType, Format};

fn attn() -> AttnSpec {
    let speeds = RopeSpeeds::Fixed(vec![1.0, 0.1]);
    AttnSpec {
        heads: 4,
        kv_heads: 2,
        head_width: 4,
        scale: 0.5,
        qkv_bias: false,
        out_bias: false,
        qk_norm_eps: None,
        out_norm_eps: None,
        rope: RopeDecl { width: 4, speeds, amplitude: 1.0 },
        mask: Mask::Causal,
    }
}

fn spec(layers: usize) -> ModelSpec {
    let mlp = MlpSpec { width: 20, activation: Activation::Silu, bias: false, down_norm_eps: None };
    ModelSpec {
        architecture: "Test".to_owned(),
        vocab: 11,
        width: 12,
        context_len: 32,
        layers: vec![LayerSpec { attn: attn(), mlp, norm_eps: 1e-6 }; layers],
        final_norm_eps: 1e-5,
        tied_head: true,
    }
}

/// A layout whose layers have q, k, v fused or not.
fn layout(spec: &ModelSpec, fused: bool) -> Layout {
    let mut decls = Vec::new();
    let mut add = |label: &str, shape| {
        let format = Format::Dense(FloatType::F32);
        decls.push(WeightDecl::new(format!("{label} {}", decls.len()), shape, format));
        WeightId(decls.len() as u32 - 1)
    };
    let embed = add("embed", [11, 12]);
    let layers = (0..spec.layers.len()).map(|_| {
        let mut linear = |label, shape| Projection { weight: add(label, shape), bias: None };
        let qkv = match fused {
            true => vec![linear("qkv", [32, 12])],
            false => vec![linear("q", [16, 12]), linear("k", [8, 12]), linear("v", [8, 12])],
        };
        let out = linear("out", [12, 16]);
        let (gate_up, down) = (vec![linear("gate_up", [40, 12])], linear("down", [12, 20]));
        let (attn_norm, mlp_norm) = (add("norm", [1, 12]), add("norm", [1, 12]));
        LayerWeights {
            attn_norm,
            qkv,
            qk_norms: None,
            out_norm: None,
            out,
            mlp_norm,
            gate_up,
            down_norm: None,
            down,
        }
    });
    let layers = layers.collect();
    let norm = add("norm", [1, 12]);
    Layout { decls, embed, layers, norm, head: embed }
}

fn names(program: &Program) -> Vec<&str> {
    program.steps.iter().map(|s| s.op.name()).collect()
}

#[test]
fn a_layer_is_ten_steps() {
    let spec = spec(2);
    let program = lower(&spec, layout(&spec, true));
    kernels::validate::program(&program).unwrap();
    let layer = ["linear", "rope", "kv-write", "attend", "linear"];
    let block = ["add+norm", "linear", "activate", "linear"];
    let expected = [
        &["embed", "norm"][..],
        &layer,
        &block,
        &["add+norm"],
        &layer,
        &block,
        &["add+norm", "gather", "linear"],
    ];
    assert_eq!(names(&program), expected.concat());
    let labels: Vec<&str> = program.slots.iter().map(|s| s.label.as_str()).collect();
    let slots = ["hidden", "normed", "delta", "qkv", "attn", "gate_up", "act", "last", "logits"];
    assert_eq!(labels, slots);
    assert_eq!(program.ropes.len(), 1, "equal tables are one");
    assert_eq!(program.kv, [KvDecl { heads: 2, head_width: 4 }; 2]);
    assert_eq!(program.slots[program.logits.index()].width, 11);
    assert_eq!(program.steps[1].label, "layers.0.attn.norm");
}

#[test]
fn rounding_is_coarse_before_gates_alone() {
    let spec = spec(2);
    let program = lower(&spec, layout(&spec, false));
    let coarse = program.weights.iter().filter(|w| w.rounding == Rounding::Coarse);
    let labels: Vec<&str> = coarse.filter_map(|w| w.label.split(' ').next()).collect();
    assert_eq!(labels, ["gate_up"; 2]);
}

#[test]
fn parts_that_do_not_stack_fill_the_same_slot() {
    let spec = spec(1);
    let program = lower(&spec, layout(&spec, false));
    kernels::validate::program(&program).unwrap();
    let views: Vec<(usize, usize)> = program.steps[2..5]
        .iter()
        .map(|s| match s.op {
            Op::Linear { out, .. } => (out.start, out.width),
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(views, [(0, 16), (16, 8), (24, 8)]);
    assert!(program.steps[3].label.starts_with("k "), "the label of its weight");
}

#[test]
fn layers_of_other_sizes_get_slots_and_tables_of_their_own() {
    let mut spec = spec(2);
    spec.layers[1].attn.rope.amplitude = 2.0;
    spec.layers[1].mlp.width = 30;
    spec.layers[1].attn.mask = Mask::Window(4);
    let mut layout = layout(&spec, true);
    let wide = layout.layers[1].gate_up[0].weight;
    layout.decls[wide.index()].shape = [60, 12];
    layout.decls[layout.layers[1].down.weight.index()].shape = [12, 30];
    let program = lower(&spec, layout);
    kernels::validate::program(&program).unwrap();
    assert_eq!(program.ropes.len(), 2);
    let wide = program.slot("gate_up_60").unwrap();
    assert_eq!(program.slots[wide.index()].width, 60);
    let masks = program.steps.iter().filter_map(|s| match s.op {
        Op::Attend { mask, .. } => Some(mask),
        _ => None,
    });
    assert_eq!(masks.collect::<Vec<_>>(), [Mask::Causal, Mask::Window(4)]);
}

#[test]
fn head_norms_come_before_the_rotation() {
    let mut spec = spec(1);
    spec.layers[0].attn.qk_norm_eps = Some(1e-3);
    let mut layout = layout(&spec, true);
    let format = Format::Dense(FloatType::F32);
    let norm = |label| WeightDecl::new(label, [1, 4], format);
    layout.decls.extend([norm("q norm"), norm("k norm")]);
    let last = layout.decls.len() as u32 - 1;
    layout.layers[0].qk_norms = Some([WeightId(last - 1), WeightId(last)]);
    let program = lower(&spec, layout);
    kernels::validate::program(&program).unwrap();
    assert_eq!(names(&program)[2..6], ["linear", "head-norm", "head-norm", "rope"]);
    let heads: Vec<(usize, usize, u32)> = program.steps[3..5]
        .iter()
        .map(|s| match s.op {
            Op::HeadNorm { heads, weight, .. } => (heads.start, heads.count, weight.0),
            ref other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(heads, [(0, 4, last - 1), (16, 2, last)]);
}

#[test]
fn sub_norms_come_before_the_output_projections() {
    let mut spec = spec(1);
    spec.layers[0].attn.out_norm_eps = Some(1e-3);
    spec.layers[0].mlp.down_norm_eps = Some(1e-4);
    let mut layout = layout(&spec, true);
    let format = Format::Dense(FloatType::F32);
    let norm = |label, width| WeightDecl::new(label, [1, width], format);
    layout.decls.extend([norm("out norm", 16), norm("down norm", 20)]);
    let last = layout.decls.len() as u32 - 1;
    layout.layers[0].out_norm = Some(WeightId(last - 1));
    layout.layers[0].down_norm = Some(WeightId(last));
    let program = lower(&spec, layout);
    kernels::validate::program(&program).unwrap();
    let block = ["norm", "linear", "add+norm", "linear", "activate", "norm", "linear"];
    assert_eq!(names(&program)[6..13], block);
    for (at, label, width, eps) in [(6, "attn", 16, 1e-3), (11, "act", 20, 1e-4)] {
        let Op::Norm { x, add: None, out, eps: found, .. } = program.steps[at].op else { panic!() };
        let [x_decl, out_decl] = [x, out].map(|s| &program.slots[s.index()]);
        assert_eq!((x_decl.label.as_str(), out_decl.width, found), (label, width, eps));
        let Op::Linear { x, .. } = program.steps[at + 1].op else { panic!() };
        assert_eq!(x, out, "the projection reads what was normed");
    }
}

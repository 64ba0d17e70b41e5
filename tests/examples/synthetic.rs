//! Writes a GPTQ checkpoint of a known shape with random weights, for measuring speed and memory
//! without a download: `cargo run --release -p testkit --example synthetic -- tinyllama-1.1b DIR`.
//!
//! 4 bits, group 128, symmetric, no act-order, f16 embedding and head. Not for reading its text.

use serde_json::json;
use std::collections::BTreeMap;
use std::path::Path;
use testkit::{Rng, Tensor, write_tensors};

const GROUP: usize = 128;

struct Shape {
    name: &'static str,
    width: usize,
    layers: usize,
    heads: usize,
    kv_heads: usize,
    mlp: usize,
    vocab: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "tinyllama-1.1b",
        width: 2048,
        layers: 22,
        heads: 32,
        kv_heads: 4,
        mlp: 5632,
        vocab: 32_000,
    },
    Shape {
        name: "mistral-7b",
        width: 4096,
        layers: 32,
        heads: 32,
        kv_heads: 8,
        mlp: 14_336,
        vocab: 32_000,
    },
    Shape { name: "tiny", width: 256, layers: 2, heads: 4, kv_heads: 2, mlp: 512, vocab: 512 },
];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, dir] = args.as_slice() else { panic!("usage: synthetic SHAPE DIR") };
    let shape = SHAPES.iter().find(|s| s.name == name);
    let shape = shape.unwrap_or_else(|| panic!("no shape {name}; see SHAPES"));
    let dir = Path::new(dir);
    std::fs::create_dir_all(dir).expect("a folder to write to");
    std::fs::write(dir.join("config.json"), config(shape).to_string()).expect("config.json");
    write_tensors(&dir.join("model.safetensors"), &tensors(shape));
}

fn config(s: &Shape) -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": s.width, "intermediate_size": s.mlp, "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads, "num_key_value_heads": s.kv_heads,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "vocab_size": s.vocab, "torch_dtype": "float16",
        "quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": GROUP,
            "sym": true, "desc_act": false, "checkpoint_format": "gptq"},
    })
}

fn tensors(s: &Shape) -> BTreeMap<String, Tensor> {
    let mut rng = Rng::new(11);
    let mut all = BTreeMap::new();
    let kv = s.width / s.heads * s.kv_heads;
    all.insert("model.embed_tokens.weight".into(), floats(&mut rng, [s.vocab, s.width]));
    all.insert("lm_head.weight".into(), floats(&mut rng, [s.vocab, s.width]));
    all.insert("model.norm.weight".into(), ones(s.width));
    for layer in 0..s.layers {
        let at = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            all.insert(format!("{at}.{norm}.weight"), ones(s.width));
        }
        for (module, n, k) in [
            ("self_attn.q_proj", s.width, s.width),
            ("self_attn.k_proj", kv, s.width),
            ("self_attn.v_proj", kv, s.width),
            ("self_attn.o_proj", s.width, s.width),
            ("mlp.gate_proj", s.mlp, s.width),
            ("mlp.up_proj", s.mlp, s.width),
            ("mlp.down_proj", s.width, s.mlp),
        ] {
            insert_gptq(&mut all, &format!("{at}.{module}"), [n, k], &mut rng);
        }
    }
    all
}

/// Random codes around zero point 8; scales that give weights a deviation of about 0.02.
fn insert_gptq(all: &mut BTreeMap<String, Tensor>, name: &str, [n, k]: [usize; 2], rng: &mut Rng) {
    let words = |rng: &mut Rng, count| (0..count).map(|_| rng.bits() as i32).collect::<Vec<_>>();
    let groups = k / GROUP;
    all.insert(format!("{name}.qweight"), Tensor::i32(&[k / 8, n], &words(rng, k / 8 * n)));
    let zeros = vec![0x7777_7777; groups * n / 8];
    all.insert(format!("{name}.qzeros"), Tensor::i32(&[groups, n / 8], &zeros));
    let scales: Vec<f32> = (0..groups * n).map(|_| 0.004 + 0.001 * rng.signed()).collect();
    all.insert(format!("{name}.scales"), Tensor::f16(&[groups, n], &scales));
    let g_idx: Vec<i32> = (0..k).map(|i| (i / GROUP) as i32).collect();
    all.insert(format!("{name}.g_idx"), Tensor::i32(&[k], &g_idx));
}

fn floats(rng: &mut Rng, shape: [usize; 2]) -> Tensor {
    Tensor::f16(&shape, &rng.floats(shape[0] * shape[1], 0.04))
}

fn ones(width: usize) -> Tensor {
    Tensor::f16(&[1, width][1..], &vec![1.0; width])
}

//! Broken and malicious model folders through the front door: every one is refused with exit
//! code 2 and one sentence that names the culprit, before any work.
//!
//! Input: a small golden model, copied and damaged. Finer cases lie beside the readers.

use crate::cli::{assert_refused, foretoken};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use tempfile::TempDir;
use testkit::{Rng, Tensor};

const FLOAT: &str = "decoders/llama_mha";
const GPTQ: &str = "quantized/gptq_llama_w4g32_actorder_asym_v2";

fn copy(case: &str) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for entry in std::fs::read_dir(testkit::golden(case)).expect("a case").map_while(Result::ok) {
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("a copy");
    }
    dir
}

fn weights(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("model.safetensors")
}

/// Runs the model in `dir`; the sentence must hold all `parts`.
fn refused(dir: &Path, parts: &[&str]) {
    let model = dir.to_str().expect("utf-8");
    assert_refused(&foretoken(&["run", model, "--ids", "1,2", "--max-tokens", "1"]), parts);
}

/// Changes the tensors of a copy of `case`.
fn with_tensors(case: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> TempDir {
    let dir = copy(case);
    let mut tensors = testkit::read_tensors(&weights(&dir));
    change(&mut tensors);
    testkit::write_tensors(&weights(&dir), &tensors);
    dir
}

/// Changes `config.json` of a copy of `case`.
fn with_config(case: &str, change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = copy(case);
    let path = dir.path().join("config.json");
    let mut config = testkit::read_json(&path);
    change(&mut config);
    std::fs::write(&path, config.to_string()).expect("a written config");
    dir
}

/// Changes the bytes of the weights of a copy of the float case.
fn with_bytes(change: impl FnOnce(&mut Vec<u8>)) -> TempDir {
    let dir = copy(FLOAT);
    let mut bytes = std::fs::read(weights(&dir)).expect("weights");
    change(&mut bytes);
    std::fs::write(weights(&dir), bytes).expect("written weights");
    dir
}

/// Replaces the header of a safetensors file, keeping its data.
fn with_header(change: impl FnOnce(&mut Value)) -> TempDir {
    with_bytes(|bytes| {
        let len = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
        let mut header: Value = serde_json::from_slice(&bytes[8..8 + len]).expect("a header");
        change(&mut header);
        let text = header.to_string();
        let data = bytes.split_off(8 + len);
        *bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(text.as_bytes());
        bytes.extend_from_slice(&data);
    })
}

const Q: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn damaged_files() {
    refused(with_bytes(|b| b.truncate(b.len() - 9)).path(), &["model.safetensors"]);
    refused(with_bytes(|b| b.truncate(5)).path(), &["model.safetensors"]);
    refused(with_bytes(Vec::clear).path(), &["model.safetensors"]);
    let huge = |b: &mut Vec<u8>| b[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    refused(with_bytes(huge).path(), &["model.safetensors", "header"]);
    let beyond = |b: &mut Vec<u8>| {
        let len = b.len() as u64;
        b[..8].copy_from_slice(&len.to_le_bytes());
    };
    refused(with_bytes(beyond).path(), &["model.safetensors", "header"]);
    refused(with_bytes(|b| b[20] = 0xff).path(), &["model.safetensors"]);
}

#[test]
fn offsets_that_lie() {
    let q = format!("{Q}.weight");
    let offsets = |range: [u64; 2]| {
        let q = q.clone();
        with_header(move |h| h[&q]["data_offsets"] = range.into())
    };
    refused(offsets([0, 8192]).path(), &["model.safetensors"]);
    refused(offsets([8192, 0]).path(), &["model.safetensors"]);
    refused(offsets([1 << 40, (1 << 40) + 8192]).path(), &["model.safetensors"]);
    refused(offsets([u64::MAX - 1, u64::MAX]).path(), &["model.safetensors"]);
}

#[test]
fn wrong_types_and_shapes() {
    let q = format!("{Q}.weight");
    let dir = with_tensors(FLOAT, |t| {
        let len: usize = t[&q].shape.iter().product();
        t.insert(q.clone(), Tensor::i32(&[len], &vec![1; len]));
    });
    refused(dir.path(), &[&q]);
    let dir = with_tensors(FLOAT, |t| {
        let tensor = t.get_mut(&q).expect("q_proj");
        tensor.shape.swap(0, 1);
        tensor.shape[0] /= 2;
        tensor.shape[1] *= 2;
    });
    refused(dir.path(), &[&q]);
    let dir = with_tensors(FLOAT, |t| {
        t.remove(&q);
    });
    refused(dir.path(), &[&q]);
    let dir = with_tensors(FLOAT, |t| {
        t.insert("model.layers.0.extra".into(), Tensor::f32(&[2], &[0.0; 2]));
    });
    refused(dir.path(), &["model.layers.0.extra"]);
    let huge = with_header(|h| h[&q]["shape"] = [u64::MAX, u64::MAX].into());
    refused(huge.path(), &["model.safetensors"]);
}

#[test]
fn missing_files() {
    for (file, part) in [("config.json", "config.json"), ("model.safetensors", "safetensors")] {
        let dir = copy(FLOAT);
        std::fs::remove_file(dir.path().join(file)).expect("a removed file");
        refused(dir.path(), &[part]);
    }
    let dir = copy(FLOAT);
    std::fs::remove_file(dir.path().join("tokenizer.json")).expect("a removed file");
    let model = dir.path().to_str().expect("utf-8");
    assert_refused(&foretoken(&["run", model, "hi"]), &["tokenizer.json", "--ids"]);
    let by_ids = foretoken(&["run", model, "--ids", "1,2", "--max-tokens", "2"]);
    assert_eq!(by_ids.code, 0, "ids need no tokenizer: {}", by_ids.err);
    let dir = copy("decoders/llama_gqa_sharded");
    let shard = "model-00002-of-00003.safetensors";
    std::fs::remove_file(dir.path().join(shard)).expect("a removed shard");
    refused(dir.path(), &[shard]);
}

#[test]
fn configurations_that_cannot_be_meant() {
    let rope = with_config(FLOAT, |c| c["rope_parameters"]["rope_type"] = "spiral".into());
    refused(rope.path(), &["rope", "spiral"]);
    let family = with_config(FLOAT, |c| c["architectures"] = serde_json::json!(["XyzForCausalLM"]));
    refused(family.path(), &["XyzForCausalLM", "LlamaForCausalLM"]);
    refused(with_config(FLOAT, |c| c["novel_key"] = 1.into()).path(), &["novel_key"]);
    for value in [0.into(), (-4).into(), 3.into(), 1e30.into(), "four".into(), Value::Null] {
        let dir = with_config(FLOAT, |c| c["num_attention_heads"] = value);
        refused(dir.path(), &["config.json", "heads"]);
    }
    refused(
        with_config(FLOAT, |c| c["hidden_act"] = "gelu".into()).path(),
        &["hidden_act", "gelu"],
    );
    let bits = with_config(GPTQ, |c| c["quantization_config"]["bits"] = 5.into());
    refused(bits.path(), &["bits", "5"]);
    let method = with_config(GPTQ, |c| c["quantization_config"]["quant_method"] = "magic".into());
    refused(method.path(), &["quant_method"]);
    let not_json = copy(FLOAT);
    std::fs::write(not_json.path().join("config.json"), "{").expect("a written config");
    refused(not_json.path(), &["config.json"]);
}

#[test]
fn quantized_tensors_that_lie() {
    let scales = format!("{Q}.scales");
    let nan = with_tensors(GPTQ, |t| {
        let bytes = &mut t.get_mut(&scales).expect("scales").bytes;
        bytes[2..4].copy_from_slice(&half::f16::NAN.to_le_bytes());
    });
    refused(nan.path(), &[&scales, "NaN"]);
    let empty = with_tensors(GPTQ, |t| {
        let n = t[&scales].shape[1];
        t.insert(scales.clone(), Tensor::f16(&[0, n], &[]));
    });
    refused(empty.path(), &[&scales]);
    let g_idx = format!("{Q}.g_idx");
    for wrong in [99, -1] {
        let dir = with_tensors(GPTQ, |t| {
            let tensor = t.get_mut(&g_idx).expect("g_idx");
            tensor.bytes[4..8].copy_from_slice(&i32::to_le_bytes(wrong));
        });
        refused(dir.path(), &[&g_idx]);
    }
    let missing = with_tensors(GPTQ, |t| {
        t.remove(&scales);
    });
    refused(missing.path(), &[&scales]);
}

/// Random damage anywhere in header and configuration: refused or run, never a panic.
#[test]
fn random_damage_never_panics() {
    let mut rng = Rng::new(20_261_121);
    for round in 0..300 {
        let dir = copy(FLOAT);
        let file = ["config.json", "model.safetensors", "tokenizer.json"][round % 3];
        let path = dir.path().join(file);
        let mut bytes = std::fs::read(&path).expect("a file");
        let reach = bytes.len().min(4096);
        for _ in 0..=rng.below(3) {
            let at = rng.below(reach);
            match rng.below(3) {
                0 => bytes[at] = rng.bits() as u8,
                1 => bytes[at] = b"0123456789-[]{}\",:e"[rng.below(19)],
                _ => bytes.truncate(at.max(1)),
            }
            if bytes.len() < reach {
                break;
            }
        }
        std::fs::write(&path, bytes).expect("a written file");
        let model = dir.path().to_str().expect("utf-8");
        let printed = foretoken(&["run", model, "a b", "--max-tokens", "1"]);
        assert!(printed.code == 0 || printed.code == 2, "round {round}: {}", printed.err);
    }
}

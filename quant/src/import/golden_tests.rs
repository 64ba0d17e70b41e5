//! Checkpoints written by GPTQModel, AutoAWQ and llm-compressor against what those tools unpack.
//!
//! Not here: settings of real configurations in general; the reader below knows these files.

use super::{RawTensor, RawType, awq, compressed, gptq};
use crate::{Grouped, reference};
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use testkit::Tensor;

/// A checkpoint folder, all of it read.
struct Checkpoint {
    tensors: BTreeMap<String, Tensor>,
    settings: Value,
}

impl Checkpoint {
    fn open(dir: &Path) -> Self {
        let config = testkit::read_json(&dir.join("config.json"));
        let tensors = testkit::read_tensors(&dir.join("model.safetensors"));
        Self { tensors, settings: config["quantization_config"].clone() }
    }

    /// Names of the quantized matrices.
    fn modules(&self) -> Vec<&str> {
        let module =
            |name: &'static str| self.tensors.keys().filter_map(move |key| key.strip_suffix(name));
        module(".qweight").chain(module(".weight_packed")).collect()
    }

    fn find<'a>(&'a self, module: &str, part: &str) -> Option<RawTensor<'a>> {
        let (name, tensor) = self.tensors.get_key_value(&format!("{module}.{part}"))?;
        let dtype = match tensor.dtype {
            Dtype::F32 => RawType::F32,
            Dtype::F16 => RawType::F16,
            Dtype::BF16 => RawType::Bf16,
            Dtype::I32 => RawType::I32,
            Dtype::I64 => RawType::I64,
            _ => RawType::Other,
        };
        Some(RawTensor { name, dtype, shape: &tensor.shape, bytes: &tensor.bytes })
    }

    fn tensor<'a>(&'a self, module: &str, part: &str) -> RawTensor<'a> {
        self.find(module, part).unwrap_or_else(|| panic!("{module}.{part} is missing"))
    }

    fn import(&self, module: &str) -> Grouped {
        match self.settings["quant_method"].as_str().unwrap() {
            "gptq" => self.gptq(module),
            "awq" => self.awq(module),
            "compressed-tensors" => self.compressed(module),
            other => panic!("no importer for {other}"),
        }
    }

    /// A key of the module's own rule, or of the whole checkpoint.
    fn number(&self, module: &str, key: &str) -> i64 {
        let rule = &self.settings["dynamic"][module][key];
        rule.as_i64().or(self.settings[key].as_i64()).unwrap()
    }

    fn gptq(&self, module: &str) -> Grouped {
        let version = match self.settings["checkpoint_format"].as_str() {
            Some("gptq_v2") => gptq::Version::V2,
            _ => gptq::Version::V1,
        };
        let bits = self.number(module, "bits") as u8;
        let group = usize::try_from(self.number(module, "group_size")).ok();
        let qweight = self.tensor(module, "qweight");
        let shape = [qweight.shape[1], qweight.shape[0] * 32 / usize::from(bits)];
        let tensors = gptq::Tensors {
            qweight,
            qzeros: self.tensor(module, "qzeros"),
            scales: self.tensor(module, "scales"),
            g_idx: self.find(module, "g_idx"),
        };
        gptq::import(&gptq::Settings { bits, group, version }, shape, 0..shape[0], &tensors)
            .unwrap()
    }

    fn awq(&self, module: &str) -> Grouped {
        let group = usize::try_from(self.number(module, "group_size")).ok();
        let qweight = self.tensor(module, "qweight");
        let tensors = awq::Tensors {
            qweight,
            qzeros: self.find(module, "qzeros"),
            scales: self.tensor(module, "scales"),
        };
        let shape = [qweight.shape[1] * 8, qweight.shape[0]];
        awq::import(&awq::Settings { bits: 4, group }, shape, 0..shape[0], &tensors).unwrap()
    }

    fn compressed(&self, module: &str) -> Grouped {
        let weights = &self.settings["config_groups"]["group_0"]["weights"];
        let settings = compressed::Settings {
            bits: weights["num_bits"].as_u64().unwrap() as u8,
            group: weights["group_size"].as_u64().map(|g| g as usize),
            symmetric: weights["symmetric"].as_bool().unwrap(),
        };
        let packed = self.tensor(module, "weight_packed");
        let tensors = compressed::Tensors {
            packed,
            scale: self.tensor(module, "weight_scale"),
            zero_point: self.find(module, "weight_zero_point"),
            g_idx: self.find(module, "weight_g_idx"),
            shape: self.find(module, "weight_shape"),
        };
        let shape = [packed.shape[0], packed.shape[1] * 32 / usize::from(settings.bits)];
        compressed::import(&settings, shape, 0..shape[0], &tensors).unwrap()
    }
}

/// Compares rows 0, 1 and last of every matrix in the expected file; returns their number.
fn compare(dir: &Path) -> usize {
    let checkpoint = Checkpoint::open(dir);
    let expected = testkit::read_tensors(&dir.join("expected.safetensors"));
    let mut matrices = 0;
    for (name, tensor) in &expected {
        let Some(module) = name.strip_prefix("dequant.") else { continue };
        let found = checkpoint.import(module);
        let n = found.shape().n;
        let rows: Vec<f32> =
            [0, 1, n - 1].iter().flat_map(|&r| reference::dequantize_row(&found, r)).collect();
        let expected = tensor.to_f32();
        assert_eq!(rows.len(), expected.len(), "{}: {module}", dir.display());
        for (i, (a, b)) in rows.iter().zip(&expected).enumerate() {
            // The references multiply the same two floats; 1e-6 allows another rounding.
            let close = (a - b).abs() <= 1e-6 * b.abs();
            assert!(close, "{}: {module} element {i}: {a} is not {b}", dir.display());
        }
        matrices += 1;
    }
    matrices
}

#[test]
fn matrices_are_those_the_quantizers_unpack() {
    for case in testkit::golden_cases("quantized") {
        let matrices = compare(&testkit::golden(&format!("quantized/{case}")));
        assert!(matrices >= 7, "{case}: only {matrices} matrices compared");
    }
}

#[test]
fn two_packings_of_one_model_are_bit_identical() {
    let Some(models) = testkit::shared_models() else { return };
    let open = |name| Checkpoint::open(&models.join("tinystories-656k-quant").join(name));
    for (a, b) in [
        ("autoround-gptq-w4g32-asym", "autoround-awq-w4g32"),
        ("gptqmodel-w4g32-actorder-asym", "gptqmodel-w4g32-actorder-asym-v2"),
    ] {
        let (left, right) = (open(a), open(b));
        assert_eq!(left.modules(), right.modules());
        for module in left.modules() {
            let (x, y) = (left.import(module), right.import(module));
            let bits = |w, r| reference::dequantize_row(w, r).into_iter().map(f32::to_bits);
            for row in 0..x.shape().n {
                assert!(bits(&x, row).eq(bits(&y, row)), "{a}, {b}: {module} row {row}");
            }
        }
    }
}

#[test]
fn every_real_checkpoint_imports() {
    let Some(models) = testkit::shared_models() else { return };
    let entries = std::fs::read_dir(models.join("tinystories-656k-quant")).unwrap();
    for dir in entries.map(|e| e.unwrap().path()) {
        let checkpoint = Checkpoint::open(&dir);
        assert!(!checkpoint.modules().is_empty(), "{}", dir.display());
        for module in checkpoint.modules() {
            checkpoint.import(module);
        }
    }
}

//! Which modules of a checkpoint are quantized and how: `quantization_config` of `config.json`,
//! or the quantizer's own file beside it.
//!
//! What cannot load is refused here, before any weight is read, by the key that says so. Not
//! here: bit layouts (crate `quant`), tensor names ([`crate::weights`]).

mod awq;
mod compressed;
mod gptq;
mod overrides;
mod pattern;

use crate::Error;
use crate::config::{Ignored, Reader, read_object};
use crate::files::ModelFiles;
use std::fmt;

/// How the codes of one module are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// Codes along k in `qweight`, scales and zero points along n.
    Gptq {
        /// 2, 3, 4 or 8.
        bits: u8,
        /// Columns of a group; none is the whole row.
        group: Option<usize>,
        /// Zero points are stored as they are (v1 stores them minus one).
        v2: bool,
        /// What the file says of symmetry; the stored zero points decide.
        symmetric: bool,
        /// The columns were reordered, so group indices must be there.
        act_order: bool,
    },
    /// Codes along n, interleaved (the GEMM layout).
    Awq {
        /// 4.
        bits: u8,
        /// Columns of a group; none is the whole row.
        group: Option<usize>,
        /// Whether zero points are stored.
        zero_points: bool,
    },
    /// compressed-tensors `pack-quantized`.
    Compressed {
        /// 4 or 8.
        bits: u8,
        /// Columns of a group; none is the whole row.
        group: Option<usize>,
        /// No zero points are stored.
        symmetric: bool,
        /// The columns of a group are not neighbours, so group indices must be there.
        act_order: bool,
    },
}

impl Packing {
    fn parts(&self) -> (&'static str, u8, Option<usize>, bool) {
        match *self {
            Self::Gptq { bits, group, v2, symmetric, .. } => {
                (if v2 { "gptq v2" } else { "gptq v1" }, bits, group, symmetric)
            }
            Self::Awq { bits, group, zero_points } => ("awq gemm", bits, group, !zero_points),
            Self::Compressed { bits, group, symmetric, .. } => {
                ("compressed-tensors", bits, group, symmetric)
            }
        }
    }
}

/// For example `gptq v1 4-bit g128 sym`.
impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (method, bits, group, symmetric) = self.parts();
        let group = group.map_or_else(|| "per row".to_owned(), |g| format!("g{g}"));
        let symmetry = if symmetric { "sym" } else { "asym" };
        write!(f, "{method} {bits}-bit {group} {symmetry}")
    }
}

/// The quantization of a checkpoint.
#[derive(Debug)]
pub struct Quantization(Kind);

#[derive(Debug)]
enum Kind {
    None,
    Gptq(gptq::Rules),
    Awq(awq::Rules),
    Compressed(compressed::Rules),
}

impl Quantization {
    /// Reads the quantization of a model folder, `config` being its `config.json`.
    ///
    /// # Errors
    /// [`Error::Config`] with the key and the reason for everything that cannot load,
    /// [`Error::UnknownKeys`] for keys nobody knows.
    pub fn read(files: &ModelFiles, config: &Reader) -> Result<Self, Error> {
        let inside = config.object("quantization_config")?;
        let inside = inside.or(config.object("compression_config")?);
        let Some(reader) = inside.map(Ok).or_else(|| own_file(files).transpose()).transpose()?
        else {
            return Ok(Self(Kind::None));
        };
        let kind = Self::by_method(&reader)?;
        reader.finish()?;
        Ok(Self(kind))
    }

    fn by_method(reader: &Reader) -> Result<Kind, Error> {
        let (key, method) = method(reader)?;
        match method {
            "gptq" => gptq::read(reader).map(Kind::Gptq),
            "awq" => awq::read(reader).map(Kind::Awq),
            "auto-round" | "intel/auto-round" => auto_round(reader),
            "compressed-tensors" => compressed::read(reader).map(Kind::Compressed),
            _ => {
                let expected = "gptq, awq, auto-round or compressed-tensors";
                Err(reader.error(key, expected))
            }
        }
    }

    /// How the linear module `name` (`model.layers.0.self_attn.q_proj`) is packed, none where it
    /// is stored as floats.
    ///
    /// # Errors
    /// [`Error::Config`] for rules of that module alone that cannot load.
    pub fn packing(&self, name: &str) -> Result<Option<Packing>, Error> {
        match &self.0 {
            Kind::None => Ok(None),
            Kind::Gptq(rules) => rules.packing(name),
            Kind::Awq(rules) => rules.packing(name),
            Kind::Compressed(rules) => rules.packing(name),
        }
    }
}

/// Files in which quantizers repeat their settings, with the method each stands for.
const OWN_FILES: &[&str] =
    &["quantize_config.json", "quant_config.json", "quantization_config.json"];

fn own_file(files: &ModelFiles) -> Result<Option<Reader>, Error> {
    for name in OWN_FILES {
        if let Some(map) = read_object(files, name)? {
            return Ok(Some(Reader::new(files.path(name), map)));
        }
    }
    Ok(None)
}

/// The key that names the method and its value; files of one tool alone need not name it.
fn method(reader: &Reader) -> Result<(&'static str, &str), Error> {
    let long = reader.text("quant_method")?;
    let short = reader.text("method")?;
    let file = reader.path().file_name().and_then(|n| n.to_str());
    match (long, short, file) {
        (Some(long), Some(short), _) if long != short => {
            Err(reader.error("method", "the same as quant_method"))
        }
        (Some(method), _, _) => Ok(("quant_method", method)),
        (None, Some(method), _) => Ok(("method", method)),
        (None, None, Some("quantize_config.json")) => Ok(("quant_method", "gptq")),
        (None, None, Some("quant_config.json")) => Ok(("quant_method", "awq")),
        (None, None, _) => Err(reader.error("quant_method", "the name of a method")),
    }
}

/// auto-round writes the packing of others and says which in `packing_format`; its own two are
/// GPTQ with zero points as they are.
fn auto_round(reader: &Reader) -> Result<Kind, Error> {
    let key = if reader.mentions("packing_format") { "packing_format" } else { "backend" };
    let format = reader.text(key)?.unwrap_or("auto_round:auto_gptq");
    match format.strip_prefix("auto_round:").unwrap_or(format) {
        "auto_awq" | "awq" => awq::read_auto_round(reader).map(Kind::Awq),
        "auto_gptq" | "gptq" => gptq::read_auto_round(reader, false).map(Kind::Gptq),
        "auto_round" | "gptqmodel" => gptq::read_auto_round(reader, true).map(Kind::Gptq),
        _ => {
            let expected = "auto_round:auto_gptq, auto_round:gptqmodel or auto_round:auto_awq";
            Err(reader.error(key, expected))
        }
    }
}

/// Refuses what would make the codes mean something else.
fn unsupported(reader: &Reader) -> Result<(), Error> {
    for key in ["adapter", "rotation", "preprocessors", "pre_filters"] {
        reader.must_be_empty(key)?;
    }
    for (key, only) in [("pack_dtype", "int32"), ("data_type", "int")] {
        if reader.text(key)?.is_some_and(|text| text != only) {
            return Err(reader.error(key, only));
        }
    }
    Ok(())
}

/// Reads the code width under whichever of `keys` is there.
fn bits(reader: &Reader, keys: &[&'static str], allowed: &[u8]) -> Result<Option<u8>, Error> {
    let list = allowed.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    for key in keys {
        if let Some(value) = reader.value(key) {
            let bits = value.as_u64().and_then(|b| u8::try_from(b).ok());
            return match bits.filter(|b| allowed.contains(b)) {
                Some(bits) => Ok(Some(bits)),
                None => Err(reader.error(key, format!("one of {list}"))),
            };
        }
    }
    Ok(None)
}

/// Reads the group size; `Some(None)` is -1, the whole row.
fn group(reader: &Reader, keys: &[&'static str]) -> Result<Option<Option<usize>>, Error> {
    for key in keys {
        if let Some(value) = reader.value(key) {
            return match value.as_i64() {
                Some(-1) => Ok(Some(None)),
                Some(g @ 1..=0x100_0000) => Ok(Some(Some(g as usize))),
                _ => Err(reader.error(key, "-1 or a positive integer")),
            };
        }
    }
    Ok(None)
}

/// Refuses activations that are quantized too: 16 bits or more means they are not.
fn float_activations(reader: &Reader) -> Result<(), Error> {
    match reader.integer("act_bits", 1..=64)? {
        Some(bits) if bits < 16 => {
            Err(reader.error("act_bits", "16: quantized activations are not supported"))
        }
        _ => Ok(()),
    }
}

/// Keys of GPTQModel, AutoGPTQ, AutoAWQ, auto-round and transformers that say how a checkpoint
/// was made or run, not how it is packed.
const IGNORED: &[Ignored] = &[
    Ignored {
        reason: "how the codes were found",
        keys: &[
            "meta",
            "quantizer",
            "static_groups",
            "true_sequential",
            "damp_percent",
            "damp_auto_increment",
            "mse",
            "act_group_aware",
            "hyb_act",
            "dataset",
            "nsamples",
            "seqlen",
            "tokenizer",
            "batch_size",
            "pad_token_id",
            "model_seqlen",
            "max_input_length",
            "module_name_preceding_first_block",
            "cache_block_outputs",
            "iters",
            "lr",
            "minmax_lr",
            "enable_minmax_tuning",
            "enable_quanted_input",
            "enable_norm_bias_tuning",
            "enable_alg_ext",
            "gradient_accumulate_steps",
            "low_gpu_mem_usage",
            "low_cpu_mem_usage",
            "amp",
            "scale_dtype",
            "provider",
            "autoround_version",
            "model_name_or_path",
            "model_file_base_name",
            "parallel_packing",
            "offload_to_disk",
            "offload_to_disk_path",
        ],
    },
    Ignored {
        reason: "which kernels another program would use",
        keys: &[
            "use_exllama",
            "disable_exllama",
            "exllama_config",
            "use_cuda_fp16",
            "do_fuse",
            "fuse_max_seq_len",
            "modules_to_fuse",
        ],
    },
    Ignored {
        reason: "the scope is checked against the tensors: a module they disagree on is refused",
        keys: &["block_name_to_quantize", "to_quant_block_names", "quant_lm_head"],
    },
    Ignored {
        reason: "read only together with act_bits below 16, which is refused",
        keys: &["act_data_type", "act_dynamic", "act_group_size", "act_sym"],
    },
];

#[cfg(test)]
mod tests;

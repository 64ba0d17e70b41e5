//! compressed-tensors in the `pack-quantized` format, weights only (W4A16, W8A16).
//!
//! Not here: the packing itself (`quant::import::compressed`). Input: the reader of
//! `quantization_config`.

use super::pattern::Pattern;
use super::{Packing, bits, group};
use crate::Error;
use crate::config::{Ignored, Reader};
use serde_json::Value;

const IGNORED: &[Ignored] = &[
    Ignored {
        reason: "bookkeeping",
        keys: &["quant_method", "method", "version", "global_compression_ratio"],
    },
    Ignored {
        reason: "how the codes were found; scales and zero points carry their own types",
        keys: &["observer", "observer_kwargs", "scale_dtype", "zp_dtype"],
    },
];

/// Schemes by target and the modules that are left alone.
#[derive(Debug)]
pub(super) struct Rules {
    schemes: Vec<(Target, Packing)>,
    skipped: Vec<Target>,
}

/// What a scheme applies to, from the most to the least specific.
#[derive(Debug)]
enum Target {
    Name(String),
    Pattern(Pattern),
    /// All linear modules, the head included.
    Linear,
}

impl Target {
    fn new(reader: &Reader, key: &str, text: &str) -> Result<Self, Error> {
        match text.strip_prefix("re:") {
            Some(pattern) => Pattern::new(reader, key, pattern).map(Self::Pattern),
            None if text == "Linear" => Ok(Self::Linear),
            None => Ok(Self::Name(text.to_owned())),
        }
    }

    fn rank(&self) -> u8 {
        match self {
            Self::Name(_) => 0,
            Self::Pattern(_) => 1,
            Self::Linear => 2,
        }
    }

    fn matches(&self, name: &str) -> Result<bool, Error> {
        match self {
            Self::Name(exact) => Ok(exact == name),
            Self::Pattern(pattern) => pattern.matches(name),
            Self::Linear => Ok(true),
        }
    }
}

impl Rules {
    pub(super) fn packing(&self, name: &str) -> Result<Option<Packing>, Error> {
        for target in &self.skipped {
            if target.matches(name)? {
                return Ok(None);
            }
        }
        for (target, packing) in &self.schemes {
            if target.matches(name)? {
                return Ok(Some(*packing));
            }
        }
        Ok(None)
    }
}

/// Reads the settings.
pub(super) fn read(reader: &Reader) -> Result<Rules, Error> {
    reader.ignore(IGNORED);
    for key in ["kv_cache_scheme", "transform_config", "moe_sparsity_config"] {
        reader.must_be_empty(key)?;
    }
    sparsity(reader)?;
    let status = reader.text("quantization_status")?.unwrap_or("compressed");
    if !["compressed", "frozen"].contains(&status) {
        return Err(reader.error("quantization_status", "compressed"));
    }
    let format = reader.text("format")?.unwrap_or("pack-quantized");
    if !["pack-quantized", "mixed-precision"].contains(&format) {
        return Err(reader.error("format", FORMAT));
    }
    let mut schemes = schemes(reader, format)?;
    schemes.sort_by_key(|(target, _)| target.rank());
    let ignore = reader.texts("ignore")?.unwrap_or_default();
    let skipped = ignore.into_iter().map(|text| Target::new(reader, "ignore", text));
    Ok(Rules { schemes, skipped: skipped.collect::<Result<_, _>>()? })
}

const FORMAT: &str = "pack-quantized: other formats are not supported";

fn sparsity(reader: &Reader) -> Result<(), Error> {
    let Some(sparsity) = reader.object("sparsity_config")? else { return Ok(()) };
    match sparsity.text("format")? {
        Some("dense") => Ok(()),
        _ => Err(reader.error("sparsity_config", "null: sparse weights are not supported")),
    }
}

fn schemes(reader: &Reader, format: &str) -> Result<Vec<(Target, Packing)>, Error> {
    let key = "config_groups";
    let groups = reader.object(key)?.ok_or_else(|| reader.error(key, "at least one group"))?;
    let mut schemes = Vec::new();
    for name in groups.keys() {
        let one = groups.object(name)?.ok_or_else(|| groups.error(name, "an object"))?;
        if one.text("format")?.unwrap_or(format) != "pack-quantized" {
            return Err(one.error("format", FORMAT));
        }
        for key in ["input_activations", "output_activations"] {
            one.must_be_empty(key)?;
        }
        let packing = weights(&one)?;
        for target in one.texts("targets")?.ok_or_else(|| one.error("targets", "a list"))? {
            schemes.push((Target::new(&one, "targets", target)?, packing));
        }
        one.finish()?;
    }
    Ok(schemes)
}

fn weights(scheme: &Reader) -> Result<Packing, Error> {
    let own = scheme.object("weights")?;
    let own = own.ok_or_else(|| scheme.error("weights", "how the weights are quantized"))?;
    own.ignore(IGNORED);
    own.must_be_off("dynamic")?;
    own.must_be_empty("block_structure")?;
    if own.text("type")?.is_some_and(|t| t != "int") {
        return Err(own.error("type", "int: float codes are not supported"));
    }
    let bits =
        bits(&own, &["num_bits"], &[4, 8])?.ok_or_else(|| own.error("num_bits", "4 or 8"))?;
    let size = group(&own, &["group_size"])?.flatten();
    let strategy = own.text("strategy")?;
    let group = match strategy.unwrap_or(if size.is_some() { "group" } else { "channel" }) {
        "group" => Some(size.ok_or_else(|| own.error("group_size", "a positive integer"))?),
        "channel" if size.is_none() => None,
        "channel" => return Err(own.error("group_size", "null, as strategy channel says")),
        _ => return Err(own.error("strategy", "group or channel")),
    };
    let symmetric = own.flag("symmetric")?.unwrap_or(true);
    let act_order = act_order(&own)?;
    own.finish()?;
    Ok(Packing::Compressed { bits, group, symmetric, act_order })
}

/// Whether groups follow the activations, so that the columns of a group are not neighbours.
fn act_order(weights: &Reader) -> Result<bool, Error> {
    match weights.value("actorder") {
        None | Some(Value::Bool(false)) => Ok(false),
        Some(Value::Bool(true)) => Ok(true),
        Some(Value::String(s)) if ["group", "dynamic"].contains(&s.as_str()) => Ok(true),
        Some(Value::String(s)) if ["weight", "static"].contains(&s.as_str()) => Ok(false),
        Some(_) => Err(weights.error("actorder", "group, weight, dynamic, static or null")),
    }
}

//! GPTQ as AutoGPTQ, GPTQModel, transformers and auto-round write it.
//!
//! Not here: the packing itself (`quant::import::gptq`). Input: the reader of their settings.

use super::overrides::Overrides;
use super::{IGNORED, Packing, bits, float_activations, group, unsupported};
use crate::Error;
use crate::config::Reader;
use serde_json::Value;

const BITS: &[u8] = &[2, 3, 4, 8];

/// Settings of a checkpoint and its exceptions by module.
#[derive(Debug)]
pub(super) struct Rules {
    packing: Packing,
    overrides: Overrides,
    /// Whether the head is quantized.
    head: bool,
    /// Names inside a layer that are quantized, none for all.
    only: Option<Vec<String>>,
}

impl Rules {
    pub(super) fn packing(&self, name: &str) -> Result<Option<Packing>, Error> {
        if let Some(found) = self.overrides.find(name)? {
            return Ok(found);
        }
        let covered = match &self.only {
            _ if name == "lm_head" => self.head,
            None => true,
            Some(list) => list.iter().any(|tail| is_tail(name, tail)),
        };
        Ok(covered.then_some(self.packing))
    }
}

/// Whether `name` ends in the dotted path `tail`.
fn is_tail(name: &str, tail: &str) -> bool {
    name.strip_suffix(tail).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// Reads the settings of AutoGPTQ, GPTQModel and transformers.
pub(super) fn read(reader: &Reader) -> Result<Rules, Error> {
    let v2 = checkpoint_format(reader)?;
    reader.value("backend"); // which kernels another program would use
    let packing = packing(reader, v2)?;
    let overrides = Overrides::dynamic(reader, packing, BITS)?;
    rules(reader, packing, overrides)
}

/// Reads auto-round's settings.
pub(super) fn read_auto_round(reader: &Reader, v2: bool) -> Result<Rules, Error> {
    let packing = packing(reader, v2)?;
    let overrides = Overrides::extra(reader, packing, BITS)?;
    rules(reader, packing, overrides)
}

fn rules(reader: &Reader, packing: Packing, overrides: Overrides) -> Result<Rules, Error> {
    reader.ignore(IGNORED);
    unsupported(reader)?;
    float_activations(reader)?;
    let head = reader.flag("lm_head")?.unwrap_or(false);
    Ok(Rules { packing, overrides, head, only: only(reader)? })
}

fn packing(reader: &Reader, v2: bool) -> Result<Packing, Error> {
    let missing = |key: &str| reader.error(key, "a number");
    let group = group(reader, &["group_size", "q_group_size"])?;
    Ok(Packing::Gptq {
        bits: bits(reader, &["bits", "w_bit"], BITS)?.ok_or_else(|| missing("bits"))?,
        group: group.ok_or_else(|| missing("group_size"))?,
        v2,
        symmetric: reader.flag("sym")?.unwrap_or(true),
        act_order: reader.flag("desc_act")?.unwrap_or(false),
    })
}

/// Whether zero points are stored as they are.
fn checkpoint_format(reader: &Reader) -> Result<bool, Error> {
    reader.must_be_off("is_marlin_format")?;
    let (long, short) = (reader.text("checkpoint_format")?, reader.text("format")?);
    if long.is_some() && short.is_some() && long != short {
        return Err(reader.error("format", "the same as checkpoint_format"));
    }
    match long.or(short) {
        None | Some("gptq") => Ok(false),
        Some("gptq_v2") => Ok(true),
        Some(_) => {
            let key = if long.is_some() { "checkpoint_format" } else { "format" };
            Err(reader.error(key, "gptq or gptq_v2: other layouts are not supported"))
        }
    }
}

/// transformers lists the quantized modules of a layer in groups.
fn only(reader: &Reader) -> Result<Option<Vec<String>>, Error> {
    let key = "modules_in_block_to_quantize";
    let Some(value) = reader.value(key) else { return Ok(None) };
    let mut names = Vec::new();
    let mut lists = vec![value];
    while let Some(value) = lists.pop() {
        match value {
            Value::String(name) => names.push(name.clone()),
            Value::Array(list) => lists.extend(list),
            _ => return Err(reader.error(key, "lists of module names")),
        }
    }
    Ok(Some(names))
}

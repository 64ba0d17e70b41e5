//! AWQ in the GEMM layout, as AutoAWQ, GPTQModel, transformers and auto-round write it.
//!
//! Not here: the packing itself (`quant::import::awq`). Input: the reader of their settings.

use super::overrides::Overrides;
use super::{IGNORED, Packing, bits, float_activations, group, unsupported};
use crate::Error;
use crate::config::Reader;

const BITS: &[u8] = &[4];

/// Settings of a checkpoint and the modules it treats otherwise.
#[derive(Debug)]
pub(super) struct Rules {
    packing: Packing,
    overrides: Overrides,
    /// Whether the head is quantized.
    head: bool,
    /// Parts of names of modules that are stored as floats.
    skipped: Vec<String>,
}

impl Rules {
    pub(super) fn packing(&self, name: &str) -> Result<Option<Packing>, Error> {
        if let Some(found) = self.overrides.find(name)? {
            return Ok(found);
        }
        let skipped = self.skipped.iter().any(|part| name.contains(part.as_str()));
        let covered = !skipped && (name != "lm_head" || self.head);
        Ok(covered.then_some(self.packing))
    }
}

/// Reads the settings of AutoAWQ, GPTQModel and transformers.
pub(super) fn read(reader: &Reader) -> Result<Rules, Error> {
    layout(reader)?;
    let packing = packing(reader)?;
    let overrides = Overrides::dynamic(reader, packing, BITS)?;
    rules(reader, packing, overrides)
}

/// Reads auto-round's settings.
pub(super) fn read_auto_round(reader: &Reader) -> Result<Rules, Error> {
    let packing = packing(reader)?;
    let overrides = Overrides::extra(reader, packing, BITS)?;
    rules(reader, packing, overrides)
}

fn packing(reader: &Reader) -> Result<Packing, Error> {
    let missing = |key: &str| reader.error(key, "a number");
    let group = group(reader, &["group_size", "q_group_size"])?;
    Ok(Packing::Awq {
        bits: bits(reader, &["bits", "w_bit"], BITS)?.ok_or_else(|| missing("bits"))?,
        group: group.ok_or_else(|| missing("group_size"))?,
        zero_points: reader.flag("zero_point")?.unwrap_or(true),
    })
}

fn rules(reader: &Reader, packing: Packing, overrides: Overrides) -> Result<Rules, Error> {
    reader.ignore(IGNORED);
    unsupported(reader)?;
    float_activations(reader)?;
    // Of symmetry the stored zero points tell; group indices do not exist in this layout.
    reader.flag("sym")?;
    reader.must_be_off("desc_act")?;
    let skipped = reader.texts("modules_to_not_convert")?.unwrap_or_default();
    Ok(Rules {
        packing,
        overrides,
        head: reader.flag("lm_head")?.unwrap_or(false),
        skipped: skipped.into_iter().map(str::to_owned).collect(),
    })
}

/// Refuses every layout but GEMM.
fn layout(reader: &Reader) -> Result<(), Error> {
    for key in ["version", "checkpoint_format", "format"] {
        if reader.text(key)?.is_some_and(|text| !text.eq_ignore_ascii_case("gemm")) {
            return Err(reader.error(key, "gemm: the other layouts of AWQ are not supported"));
        }
    }
    // `backend` names the writer in older files; llm-awq packs in another order.
    if reader.text("backend")?.is_some_and(|text| text.starts_with("llm-awq")) {
        return Err(reader.error("backend", "autoawq: llm-awq packs in another order"));
    }
    Ok(())
}

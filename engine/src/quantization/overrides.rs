//! Settings that differ by module: GPTQModel's `dynamic`, auto-round's `extra_config`.
//!
//! Not here: which keys a method knows at its top. Input: the reader of its settings.

use super::pattern::Pattern;
use super::{IGNORED, Packing, bits, float_activations, group, unsupported};
use crate::Error;
use crate::config::Reader;
use serde_json::Value;

/// Exceptions from a packing; the first whose pattern matches a module counts.
#[derive(Debug, Default)]
pub(super) struct Overrides(Vec<(Pattern, Option<Packing>)>);

impl Overrides {
    /// GPTQModel's: a pattern, `-:` before one that excludes, `+:` optional before others.
    pub(super) fn dynamic(reader: &Reader, base: Packing, widths: &[u8]) -> Result<Self, Error> {
        let key = "dynamic";
        let Some(table) = reader.object(key)? else { return Ok(Self::default()) };
        let mut all = Vec::new();
        for name in table.keys() {
            let excluded = name.strip_prefix("-:");
            let packing = match excluded {
                None => Some(overridden(&table, name, base, widths)?),
                Some(_) => {
                    table.value(name); // an excluded module has no settings
                    None
                }
            };
            let text = excluded.or(name.strip_prefix("+:")).unwrap_or(name);
            all.push((Pattern::new(reader, key, text)?, packing));
        }
        Ok(Self(all))
    }

    /// auto-round's: a module name, or a pattern that matches anywhere; 16 bits are floats.
    pub(super) fn extra(reader: &Reader, base: Packing, widths: &[u8]) -> Result<Self, Error> {
        let key = "extra_config";
        let Some(table) = reader.object(key)? else { return Ok(Self::default()) };
        let mut all = Vec::new();
        for name in table.keys() {
            let width =
                table.object(name)?.and_then(|own| own.value("bits").and_then(Value::as_u64));
            let floats = width.is_some_and(|bits| bits >= 16);
            let packing = if floats { None } else { Some(overridden(&table, name, base, widths)?) };
            let plain = name.chars().all(|c| c.is_alphanumeric() || "._".contains(c));
            let text =
                if plain { format!("{}$", name.replace('.', "\\.")) } else { format!(".*{name}") };
            all.push((Pattern::new(reader, key, &text)?, packing));
        }
        Ok(Self(all))
    }

    /// What is said of module `name`: `Some(None)` leaves it as floats.
    pub(super) fn find(&self, name: &str) -> Result<Option<Option<Packing>>, Error> {
        for (pattern, packing) in &self.0 {
            if pattern.matches(name)? {
                return Ok(Some(*packing));
            }
        }
        Ok(None)
    }
}

/// `base` with what entry `name` of `table` changes.
fn overridden(table: &Reader, name: &str, base: Packing, widths: &[u8]) -> Result<Packing, Error> {
    let Some(own) = table.object(name)? else { return Ok(base) };
    own.ignore(IGNORED);
    unsupported(&own)?;
    float_activations(&own)?;
    let mut packing = base;
    let (new_bits, new_group) = (bits(&own, &["bits"], widths)?, group(&own, &["group_size"])?);
    let (new_sym, new_order) = (own.flag("sym")?, own.flag("desc_act")?);
    match &mut packing {
        Packing::Gptq { bits, group, symmetric, act_order, .. } => {
            *bits = new_bits.unwrap_or(*bits);
            *group = new_group.unwrap_or(*group);
            *symmetric = new_sym.unwrap_or(*symmetric);
            *act_order = new_order.unwrap_or(*act_order);
        }
        Packing::Awq { bits, group, .. } | Packing::Compressed { bits, group, .. } => {
            *bits = new_bits.unwrap_or(*bits);
            *group = new_group.unwrap_or(*group);
        }
    }
    own.finish()?;
    Ok(packing)
}

//! Rotary embedding: from `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta`
//! (transformers 4) to angle speeds.
//!
//! With `i` a pair, `w` the head width and `f(i) = theta^(-2i / w)`:
//!
//! ```text
//! default   f(i)
//! linear    f(i) / factor
//! dynamic   theta grows with the length, see RopeSpeeds::DynamicNtk
//! yarn      a ramp over i from f(i) (fast pairs) to f(i) / factor (slow pairs)
//! llama3    the same, the ramp being over the wavelength 2 pi / f(i)
//! longrope  f(i) / short[i] up to the trained length, f(i) / long[i] beyond
//! ```
//! Speeds are computed in f64 and rounded once. Not here: sines and cosines (the backends).

use crate::Error;
use crate::config::Reader;
use kernels::program::{RopeDecl, RopeSpeeds};
use std::f64::consts::TAU;

/// The base of dynamic NTK follows the length, so the maths sets no end and transformers none
/// either; memory needs one, this many times the length that the factor was chosen for.
const DYNAMIC_REACH: f64 = 4.0;

/// Reads the rotary table of heads of `width` columns and the context it reaches, given
/// `max_position_embeddings`.
pub(super) fn read(config: &Reader, width: usize, context: u32) -> Result<(RopeDecl, u32), Error> {
    let dict = dictionary(config)?;
    full_rotation(config)?;
    let top_theta = theta(config)?;
    let trained = config.count("original_max_position_embeddings", u32::MAX as usize)?;
    let longest = config.count("max_sequence_length", u32::MAX as usize)?.unwrap_or(0) as u32;
    let Some(dict) = dict else {
        let speeds = default_speeds(top_theta.unwrap_or(THETA), width);
        return Ok((fixed(width, speeds, 1.0), context.max(longest)));
    };
    full_rotation(&dict)?;
    let rope = Rope {
        theta: theta(&dict)?.or(top_theta).unwrap_or(THETA),
        width,
        context: f64::from(context),
        trained: trained.map(|t| t as f64),
        dict,
    };
    let (decl, reach) = rope.by_type()?;
    rope.dict.finish()?;
    Ok((decl, reach.max(longest)))
}

/// The base where no key gives one.
const THETA: f64 = 10_000.0;

fn theta(reader: &Reader) -> Result<Option<f64>, Error> {
    reader.number("rope_theta", 1.001..=1e15)
}

/// The object that describes the scaling, whichever way it is spelt.
fn dictionary(config: &Reader) -> Result<Option<Reader>, Error> {
    let old = config.object("rope_scaling")?;
    let new = config.object("rope_parameters")?;
    if old.is_some()
        && new.is_some()
        && config.value("rope_scaling") != config.value("rope_parameters")
    {
        return Err(config.error("rope_scaling", "null, since rope_parameters is given too"));
    }
    Ok(old.or(new))
}

fn full_rotation(reader: &Reader) -> Result<(), Error> {
    match reader.number("partial_rotary_factor", -1e6..=1e6)? {
        Some(factor) if factor != 1.0 => {
            Err(reader.error("partial_rotary_factor", "1: every column must rotate"))
        }
        _ => Ok(()),
    }
}

fn fixed(width: usize, speeds: Vec<f64>, amplitude: f64) -> RopeDecl {
    let speeds = speeds.into_iter().map(|s| s as f32).collect();
    RopeDecl { width, speeds: RopeSpeeds::Fixed(speeds), amplitude: amplitude as f32 }
}

fn default_speeds(theta: f64, width: usize) -> Vec<f64> {
    (0..width / 2).map(|i| theta.powf(-(2.0 * i as f64) / width as f64)).collect()
}

/// A rotary embedding with a dictionary.
struct Rope {
    theta: f64,
    width: usize,
    /// `max_position_embeddings`.
    context: f64,
    /// `original_max_position_embeddings` beside the dictionary; it outranks the one inside.
    trained: Option<f64>,
    dict: Reader,
}

impl Rope {
    fn by_type(&self) -> Result<(RopeDecl, u32), Error> {
        let (new, old) = (self.dict.text("rope_type")?, self.dict.text("type")?);
        if new.is_some() && old.is_some() && new != old {
            return Err(self.dict.error("type", "the same as rope_type"));
        }
        match new.or(old).unwrap_or("default") {
            "default" => Ok((self.fixed(self.speeds(), 1.0), self.context as u32)),
            "linear" => self.linear(),
            "dynamic" => self.dynamic(),
            "yarn" => self.yarn(),
            "llama3" => self.llama3(),
            "longrope" => self.longrope(),
            _ => {
                let key = if new.is_some() { "rope_type" } else { "type" };
                let expected = "default, linear, dynamic, yarn, llama3 or longrope";
                Err(self.dict.error(key, expected))
            }
        }
    }

    fn speeds(&self) -> Vec<f64> {
        default_speeds(self.theta, self.width)
    }

    fn fixed(&self, speeds: Vec<f64>, amplitude: f64) -> RopeDecl {
        fixed(self.width, speeds, amplitude)
    }

    fn positive(&self, key: &str) -> Result<Option<f64>, Error> {
        self.dict.number(key, 1e-6..=1e6)
    }

    fn need(&self, key: &str) -> Result<f64, Error> {
        self.positive(key)?.ok_or_else(|| self.dict.error(key, "a positive number"))
    }

    /// The context length of training, by default the model's own.
    fn trained(&self) -> Result<f64, Error> {
        let key = "original_max_position_embeddings";
        let inner = self.dict.count(key, u32::MAX as usize)?.map(|t| t as f64);
        let trained = self.trained.or(inner).unwrap_or(self.context);
        if trained < 2.0 {
            return Err(self.dict.error(key, "an integer above 1"));
        }
        Ok(trained)
    }

    /// Linear and dynamic scaling count from `max_position_embeddings` alone.
    fn ignore_trained(&self) {
        self.dict.value("original_max_position_embeddings");
    }

    fn linear(&self) -> Result<(RopeDecl, u32), Error> {
        self.ignore_trained();
        let factor = self.need("factor")?;
        let speeds = self.speeds().into_iter().map(|s| s / factor).collect();
        Ok((self.fixed(speeds, 1.0), self.context as u32))
    }

    fn dynamic(&self) -> Result<(RopeDecl, u32), Error> {
        self.ignore_trained();
        let factor = self.need("factor")?;
        if self.width < 4 {
            return Err(self.dict.error("rope_type", "another type: head_dim is below 4"));
        }
        let speeds = RopeSpeeds::DynamicNtk {
            theta: self.theta as f32,
            factor: factor as f32,
            trained: self.context as u32,
        };
        let rope = RopeDecl { width: self.width, speeds, amplitude: 1.0 };
        Ok((rope, (self.context * factor.max(1.0) * DYNAMIC_REACH) as u32))
    }

    fn yarn(&self) -> Result<(RopeDecl, u32), Error> {
        let trained = self.trained()?;
        let factor = match self.positive("factor")? {
            None if self.dict.mentions("factor") => self.context / trained,
            given => given.ok_or_else(|| self.dict.error("factor", "a positive number"))?,
        };
        let amplitude = self.yarn_amplitude(factor)?;
        let [low, high] = self.yarn_ramp(trained)?;
        let blend = |(i, speed): (usize, f64)| {
            let slow = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
            speed / factor * slow + speed * (1.0 - slow)
        };
        let speeds = self.speeds().into_iter().enumerate().map(blend).collect();
        let context = self.context.max(trained * factor);
        self.dict.value("finetuned"); // says how the model was made, not how it computes
        Ok((self.fixed(speeds, amplitude), context as u32))
    }

    /// Factor on sine and cosine.
    fn yarn_amplitude(&self, factor: f64) -> Result<f64, Error> {
        let given = self.positive("attention_factor")?;
        let mscale = self.dict.number("mscale", 0.0..=1e6)?.unwrap_or(0.0);
        let all_dim = self.dict.number("mscale_all_dim", 0.0..=1e6)?.unwrap_or(0.0);
        let scale = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let both = mscale != 0.0 && all_dim != 0.0;
        let derived = if both { scale(mscale) / scale(all_dim) } else { scale(1.0) };
        Ok(given.unwrap_or(derived))
    }

    /// Pairs between which the ramp climbs.
    fn yarn_ramp(&self, trained: f64) -> Result<[f64; 2], Error> {
        let beta = |key| Ok::<_, Error>(self.dict.number(key, 0.0..=1e6)?.filter(|b| *b != 0.0));
        let fast = beta("beta_fast")?.unwrap_or(32.0);
        let slow = beta("beta_slow")?.unwrap_or(1.0);
        let truncate = self.dict.flag("truncate")?.unwrap_or(true);
        // The pair that turns `rotations` times within the trained length.
        let pair = |rotations: f64| {
            self.width as f64 * (trained / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
        };
        let (low, high) = (pair(fast), pair(slow));
        let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(self.width as f64 - 1.0));
        // Equal ends would divide by zero; transformers takes this very step between them.
        Ok([low, if low == high { high + 0.001 } else { high }])
    }

    fn llama3(&self) -> Result<(RopeDecl, u32), Error> {
        let trained = self.trained()?;
        let factor = self.need("factor")?;
        let (low, high) = (self.need("low_freq_factor")?, self.need("high_freq_factor")?);
        if low >= high {
            return Err(self.dict.error("high_freq_factor", format!("more than {low}")));
        }
        let scale = |speed: f64| {
            let turns = trained * speed / TAU; // of this pair within the trained length
            let smooth = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            (1.0 - smooth) * speed / factor + smooth * speed
        };
        let speeds = self.speeds().into_iter().map(scale).collect();
        Ok((self.fixed(speeds, 1.0), self.context as u32))
    }

    fn longrope(&self) -> Result<(RopeDecl, u32), Error> {
        let trained = self.trained()?;
        let factor = self.positive("factor")?.unwrap_or(self.context / trained);
        let derived = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / trained.ln()).sqrt() };
        let amplitude = self.positive("attention_factor")?.unwrap_or(derived);
        let table = |key: &str| -> Result<Vec<f32>, Error> {
            let factors = self.dict.numbers(key, self.width / 2)?;
            let factors = factors.ok_or_else(|| self.dict.error(key, "a list of numbers"))?;
            let speeds = self.speeds().into_iter();
            Ok(speeds.zip(factors).map(|(speed, f)| (speed / f) as f32).collect())
        };
        let (short, long) = (table("short_factor")?, table("long_factor")?);
        let speeds = RopeSpeeds::Switched { short, long, switch: trained as u32 };
        let rope = RopeDecl { width: self.width, speeds, amplitude: amplitude as f32 };
        Ok((rope, self.context as u32))
    }
}

#[cfg(test)]
#[path = "rope_tests.rs"]
mod tests;

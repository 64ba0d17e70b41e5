//! What drafting may cost: an account of time in plain tokens, and when to try again.
//!
//! One plain token is the time that plain decoding takes for a token in the same step. The account
//! grows by every token generated, with a small surcharge, and shrinks by the time that took;
//! nobody may draft so much that, were all of it rejected, it fell below zero. So whatever texts
//! and drafters do, the time (by the measured costs) stays below that of plain decoding and the
//! surcharges. Not here: what pays ([`super`]).

/// Surcharge on each generated token, and on those that a sequence may generate, up to
/// [`CREDIT_TOKENS`], in advance. The rest up to 0.02 is for costs that were measured wrong.
const SURCHARGE: f64 = 0.0075;
/// Most tokens of a sequence for which the surcharge is given in advance.
const CREDIT_TOKENS: usize = 256;
/// Most of the time that probes take in the long run.
const PROBE_SHARE: f64 = 0.01;
/// Tokens before the first probe after drafting stopped to pay; each probe that does not pay
/// doubles the pause, until [`PROBE_SHARE`] allows no more than it does.
const FIRST_PAUSE: f64 = 1.0;

/// The account.
#[derive(Debug, Clone, Default)]
pub(super) struct Account {
    balance: f64,
    /// Plain tokens since a draft was last verified.
    since: f64,
    /// Probes without gain, one after another.
    failures: u32,
}

impl Account {
    /// Takes a sequence of at most `tokens` more tokens in.
    pub(super) fn open(&mut self, tokens: usize) {
        self.balance += SURCHARGE * tokens.min(CREDIT_TOKENS) as f64;
    }

    /// Whether a step may take `time` if it gives no more than `tokens`.
    pub(super) fn allows(&self, time: f64, tokens: usize) -> bool {
        self.balance + tokens as f64 * (1.0 + SURCHARGE) >= time
    }

    /// Whether it is time to spend `price` on finding out whether drafting pays again.
    pub(super) fn probe_is_due(&self, price: f64) -> bool {
        let doubled = if self.failures == 0 {
            0.0
        } else {
            FIRST_PAUSE * 2f64.powi(self.failures as i32 - 1)
        };
        self.since >= doubled.min(price / PROBE_SHARE)
    }

    /// Books a step that took `time` and gave `tokens`, and whether drafts were verified in it.
    pub(super) fn book(&mut self, time: f64, tokens: usize, drafted: bool) {
        let tokens = tokens as f64;
        self.balance += tokens * (1.0 + SURCHARGE) - time;
        if !drafted {
            self.since += tokens;
            return;
        }
        self.since = 0.0;
        // Beyond a thousand doublings there is nothing to tell apart.
        self.failures = if tokens > time { 0 } else { (self.failures + 1).min(1000) };
    }
}

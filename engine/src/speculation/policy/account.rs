//! What drafting may cost: an account of time, and when to try again.
//!
//! Seconds of plain decoding are what its steps would have taken for the same tokens with as many
//! sequences. The account grows by them, with a small surcharge, and shrinks by the seconds that
//! the steps really take; nobody may draft so much that, were all of it rejected, it fell below
//! zero. So whatever texts and drafters do, the time (by the measured costs) stays below that of
//! plain decoding and the surcharges. Not here: what pays ([`super`]).

/// Surcharge on the time of each generated token. The rest up to 0.02, with what is given in advance, is for
/// costs that were measured wrong.
const SURCHARGE: f64 = 0.005;
/// Surcharge in advance, on the tokens that a sequence may generate, up to [`CREDIT_TOKENS`]: texts begin
/// with tokens that are hard to guess, and who stops there falls behind, so that trying again costs more
/// every token than the surcharge on it.
const ADVANCE: f64 = 0.011;
/// Most tokens of a sequence for which a surcharge is given in advance.
const CREDIT_TOKENS: usize = 512;
/// Most of the time that probes take in the long run.
const PROBE_SHARE: f64 = 0.01;
/// Tokens before the first probe after drafting stopped to pay; each probe that does not pay
/// doubles the pause, until [`PROBE_SHARE`] allows no more than it does.
const FIRST_PAUSE: f64 = 1.0;

/// The account.
#[derive(Debug, Clone, Default)]
pub(super) struct Account {
    /// Seconds.
    balance: f64,
    /// Tokens for which the surcharge in advance is still to be given.
    credit_tokens: usize,
    /// Seconds of plain decoding since a draft was last verified.
    since: f64,
    /// Probes without gain, one after another.
    failures: u32,
}

impl Account {
    /// Takes a sequence of at most `tokens` more tokens in.
    pub(super) fn open(&mut self, tokens: usize) {
        self.credit_tokens += tokens.min(CREDIT_TOKENS);
    }

    /// Gives the surcharge in advance for new sequences, in a step whose tokens take `plain_token`
    /// seconds each without drafts.
    pub(super) fn credit(&mut self, plain_token: f64) {
        let tokens = std::mem::take(&mut self.credit_tokens);
        self.balance += ADVANCE * tokens as f64 * plain_token;
    }

    /// Whether a step may take `seconds` if it gives no more tokens than one of `plain` seconds.
    pub(super) fn allows(&self, seconds: f64, plain: f64) -> bool {
        self.balance + plain * (1.0 + SURCHARGE) >= seconds
    }

    /// Whether it is time to spend `price` seconds on finding out whether drafting pays again.
    pub(super) fn probe_is_due(&self, price: f64, plain_token: f64) -> bool {
        let pause = match self.failures {
            0 => 0.0,
            failures => FIRST_PAUSE * plain_token * 2f64.powi(failures as i32 - 1),
        };
        self.since >= pause.min(price / PROBE_SHARE)
    }

    /// Books a step that took `seconds` and gave tokens that take `plain` seconds without drafts,
    /// and whether a drafter worked in it.
    pub(super) fn book(&mut self, seconds: f64, plain: f64, drafted: bool) {
        self.balance += plain * (1.0 + SURCHARGE) - seconds;
        if !drafted {
            self.since += plain;
            return;
        }
        self.since = 0.0;
        // Beyond a thousand doublings there is nothing to tell apart.
        self.failures = if plain > seconds { 0 } else { (self.failures + 1).min(1000) };
    }
}

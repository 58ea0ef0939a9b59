//! Who of those that wait for room enters next.
//!
//! In order of arrival, as long as they are served in the end: that is fair, and who asks again and again gets no more
//! than others. Under lasting overload it is the worst order there is: where all bear the same wait, whoever comes to the
//! head of the line is about to leave, and nearly all work is for nobody. So once many leave unserved, the newest enter
//! first, until few leave.

/// Counts what became of those who wanted in, the latest ones most.
#[derive(Debug, Default)]
pub(super) struct Departures {
    left: u32,
    served: u32,
    newest_first: bool,
}

/// Departures that are counted; older ones count half, and so on.
const WINDOW: u32 = 128;
/// The newest go first once more than one in so many leaves unserved.
const MANY: u32 = 8;
/// Order of arrival returns once less than one in so many does.
const FEW: u32 = 32;

impl Departures {
    /// So many left, while they waited for room or in line.
    pub fn left(&mut self, count: usize) {
        self.left = self.left.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        self.judge();
    }

    /// So many were taken.
    pub fn served(&mut self, count: usize) {
        self.served = self.served.saturating_add(u32::try_from(count).unwrap_or(u32::MAX));
        self.judge();
    }

    /// Whether the newest enter first.
    pub fn newest_first(&self) -> bool {
        self.newest_first
    }

    fn judge(&mut self) {
        while self.left.saturating_add(self.served) > WINDOW {
            self.left /= 2;
            self.served /= 2;
        }
        let all = (self.left + self.served).max(WINDOW / 2);
        if self.left > all / MANY {
            self.newest_first = true;
        } else if self.left < all / FEW {
            self.newest_first = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_who_leave_change_nothing_and_many_do() {
        let mut departures = Departures::default();
        departures.left(3);
        assert!(!departures.newest_first(), "a client may end whenever it likes");
        for _ in 0..1000 {
            departures.served(12);
            departures.left(1);
            assert!(!departures.newest_first());
        }
        for _ in 0..20 {
            departures.served(5);
            departures.left(1);
        }
        assert!(departures.newest_first());
    }

    #[test]
    fn order_returns_soon_after_the_last_one_left() {
        let mut departures = Departures::default();
        departures.left(1_000_000);
        assert!(departures.newest_first());
        let served = (0..).take_while(|_| {
            departures.served(16);
            departures.newest_first()
        });
        assert!(served.count() < 30);
        departures.left(usize::MAX);
        departures.served(usize::MAX);
    }
}

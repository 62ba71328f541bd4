//! All orders in which the operations of a small case can land, one after another.
//!
//! A run asks at each of its turns which of so many operations lands next. The choices of the last run
//! make those of the next one: the last choice that has another way takes it, and what followed is
//! forgotten. A run must be the same when its choices are.

/// One order of all that there are; the first of them at first.
#[derive(Debug, Default)]
pub struct Order {
    /// Which was chosen, of how many.
    turns: Vec<(usize, usize)>,
    at: usize,
}

impl Order {
    /// Which of `of` operations lands next.
    ///
    /// Panics when the same choices led elsewhere in the run before.
    pub fn choose(&mut self, of: usize) -> usize {
        if self.at == self.turns.len() {
            self.turns.push((0, of));
        }
        let (chosen, known) = self.turns[self.at];
        assert_eq!(of, known, "a run that does not repeat");
        self.at += 1;
        chosen
    }

    /// Makes it the next order; false when there is none.
    pub fn advance(&mut self) -> bool {
        self.at = 0;
        while let Some((chosen, of)) = self.turns.pop() {
            if chosen + 1 < of {
                self.turns.push((chosen + 1, of));
                return true;
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_things_have_six_orders() {
        let (mut order, mut seen) = (Order::default(), Vec::new());
        loop {
            let mut left = vec!['a', 'b', 'c'];
            seen.push(
                (1..=3)
                    .rev()
                    .map(|of| left.remove(order.choose(of)))
                    .collect::<String>(),
            );
            if !order.advance() {
                break;
            }
        }
        assert_eq!(seen, ["abc", "acb", "bac", "bca", "cab", "cba"]);
    }
}

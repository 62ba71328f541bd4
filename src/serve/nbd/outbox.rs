//! Answers on their way out: encoded in the order they come, as many as fit in one send.
//!
//! Heads of a batch share one buffer; data is sent from where it was read to.

use super::command::Answer;
use super::limits;
use super::meta;
use super::proto::{HEAD_MAX, Head, Style};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// An answer that waits to be sent.
#[derive(Debug)]
pub(super) struct Reply {
    /// The request's name.
    pub(super) cookie: u64,
    /// The request's first byte.
    pub(super) offset: u64,
    /// What the request holds of the connection's share of memory until it is answered.
    pub(super) cost: usize,
    /// What to say.
    pub(super) answer: Answer,
}

/// Answers that are sent together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// In order.
    pub(super) parts: Vec<Bytes>,
    /// The data among them, to be reused once sent.
    pub(super) lent: Vec<Bytes>,
    /// How many requests they answer.
    pub(super) requests: usize,
    /// What these requests hold.
    pub(super) cost: usize,
}

/// Encodes answers.
#[derive(Debug)]
pub(super) struct Encoder {
    style: Style,
    heads: BytesMut,
}

impl Encoder {
    pub(super) fn new(style: Style) -> Self {
        Self {
            style,
            heads: BytesMut::new(),
        }
    }

    /// Takes answers off the queue, at least one if there is one, until a send is full.
    pub(super) fn batch(&mut self, queue: &mut VecDeque<Reply>) -> Batch {
        self.heads
            .reserve(queue.len().min(limits::BATCH_PARTS) * HEAD_MAX);
        let (mut batch, mut bytes) = (Batch::default(), 0);
        while bytes < limits::BATCH_BYTES && batch.parts.len() < limits::BATCH_PARTS - 4 {
            let Some(reply) = queue.pop_front() else {
                break;
            };
            batch.requests += 1;
            batch.cost += reply.cost;
            bytes += self.append(reply, &mut batch);
        }
        self.finish_heads(&mut batch);
        batch
    }

    fn append(&mut self, reply: Reply, batch: &mut Batch) -> usize {
        let head = Head {
            style: self.style,
            cookie: reply.cookie,
            offset: reply.offset,
        };
        match reply.answer {
            Answer::Done => head.done(&mut self.heads),
            Answer::Failed(refusal) => head.error(&mut self.heads, refusal.errno, &refusal.text),
            Answer::Data(data) => {
                head.data(&mut self.heads, data.len() as u64);
                self.finish_heads(batch);
                let (len, data) = (data.len(), data.freeze());
                batch.lent.push(data.clone());
                batch.parts.push(data);
                return len;
            }
            Answer::Status(contexts) => {
                self.finish_heads(batch);
                let mut status = BytesMut::new();
                let last = contexts.len().saturating_sub(1);
                for (n, blocks) in contexts.iter().enumerate() {
                    meta::describe(head, blocks, n == last, &mut status);
                }
                let len = status.len();
                batch.parts.push(status.freeze());
                return len;
            }
        }
        HEAD_MAX
    }

    fn finish_heads(&mut self, batch: &mut Batch) {
        if !self.heads.is_empty() {
            batch.parts.push(self.heads.split().freeze());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::command::Refusal;
    use super::super::proto::Errno;
    use super::*;

    fn reply(cookie: u64, answer: Answer) -> Reply {
        Reply {
            cookie,
            offset: 512,
            cost: 10,
            answer,
        }
    }

    #[test]
    fn answers_without_data_leave_as_one_part() {
        let failed = Answer::Failed(Refusal::new(Errno::Perm, "the export is read-only"));
        let mut queue = VecDeque::from([reply(1, Answer::Done), reply(2, failed)]);
        let batch = Encoder::new(Style::Simple).batch(&mut queue);
        assert_eq!((batch.parts.len(), batch.requests, batch.cost), (1, 2, 20));
        let expected = [
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2],
        ];
        assert_eq!(batch.parts.concat(), expected.concat());
    }

    #[test]
    fn data_follows_its_head_and_is_lent_until_sent() {
        let data = || Answer::Data(BytesMut::from(&b"abc"[..]));
        for (style, head) in [
            (Style::Simple, 16),
            (Style::Structured, 28),
            (Style::Extended, 40),
        ] {
            let mut queue = VecDeque::from([reply(1, data()), reply(2, data())]);
            let batch = Encoder::new(style).batch(&mut queue);
            let sizes: Vec<_> = batch.parts.iter().map(Bytes::len).collect();
            assert_eq!(sizes, [head, 3, head, 3], "{style:?}");
            assert_eq!(batch.lent.len(), 2);
        }
    }

    #[test]
    fn a_batch_is_bounded_and_nothing_is_lost_or_reordered() {
        let mut queue: VecDeque<_> = (0..2000)
            .map(|i| {
                reply(
                    i,
                    Answer::Data(BytesMut::zeroed(if i % 100 == 0 { 300_000 } else { 1 })),
                )
            })
            .collect();
        let mut encoder = Encoder::new(Style::Simple);
        let mut cookie = 0u64;
        while !queue.is_empty() {
            let batch = encoder.batch(&mut queue);
            assert!(batch.requests > 0 && batch.parts.len() <= limits::BATCH_PARTS);
            for head in batch.parts.iter().step_by(2) {
                assert_eq!(head[8..16], cookie.to_be_bytes());
                cookie += 1;
            }
        }
        assert_eq!(cookie, 2000);
        assert_eq!(encoder.batch(&mut queue).requests, 0);
    }
}

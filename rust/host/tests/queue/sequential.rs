// SPDX-License-Identifier: GPL-2.0

//! Random sequences of operations on two queues, compared with a model of what is to be seen.

use crate::{
    generation,
    queue::{self, Buffer, Queue, Watch},
    state::Record, //
};
use kernel::{
    bindings::{POLLERR, POLLIN, POLLRDNORM},
    check,
    fs::File,
    mm::{
        MmWithUser,
        interval_notifier::{Event, Registration}, //
    },
    prelude::*,
    sync::{
        Arc,
        poll::{PollTable, Poller}, //
    },
};
use loom::thread;
use proptest::{collection::vec, prelude::*, sample::Index, test_runner::RngAlgorithm};
use std::{
    cell::{Cell, RefCell},
    collections::{BTreeSet, VecDeque},
    mem,
    ops::Range,
    rc::Rc,
};

const PAGE: usize = 4096;
const BASE: usize = 16 * PAGE;
const PAGES: usize = 12;

#[derive(Clone, Debug)]
enum Op {
    Watch {
        queue: usize,
        mrs: Vec<Range<usize>>,
        live: bool,
    },
    GoLive(Index),
    Hit {
        event: u32,
        range: Range<usize>,
    },
    Detach(Index),
    Poll {
        queue: usize,
        register: bool,
    },
    Close(usize),
    Read(Read),
}

#[derive(Clone, Debug)]
struct Read {
    queue: usize,
    max: usize,
    /// What happens each time the reader goes to sleep, and whether it gets a signal then, which it
    /// does anyhow if nothing wakes it up; or nonblocking.
    asleep: Option<Vec<(Vec<Op>, bool)>>,
    /// What happens to each copy, until all succeed.
    copies: Vec<Copy>,
}

#[derive(Clone, Debug)]
enum Copy {
    Succeed,
    /// The buffer faults. Meanwhile the operations happen, then so many records have a place.
    Fault(Vec<Op>, Index),
    Fail(Vec<Op>, Error),
}

/// A part of the addresses that are used here, often on the boundary of a page.
fn range() -> impl Strategy<Value = Range<usize>> {
    let address = || {
        (
            0..PAGES,
            prop_oneof![Just(0), Just(1), Just(PAGE - 1), 0..PAGE],
        )
            .prop_map(|(page, offset)| BASE + page * PAGE + offset)
    };

    (address(), address()).prop_map(|(a, b)| a.min(b)..a.max(b) + 1)
}

fn leaf() -> impl Strategy<Value = Op> {
    let hit =
        prop_oneof![6 => range(), 2 => Just(BASE..BASE + PAGES * PAGE), 1 => Just(0..usize::MAX)];

    prop_oneof![
        3 => (0..2usize, vec(range(), 1..4), any::<bool>())
            .prop_map(|(queue, mrs, live)| Op::Watch { queue, mrs, live }),
        2 => any::<Index>().prop_map(Op::GoLive),
        8 => (prop_oneof![3 => 0..2u32, 1 => 0..20u32], hit)
            .prop_map(|(event, range)| Op::Hit { event, range }),
        3 => any::<Index>().prop_map(Op::Detach),
        1 => (0..2usize, any::<bool>()).prop_map(|(queue, register)| Op::Poll { queue, register }),
        2 => (0..2usize, 1..4usize).prop_map(|(queue, max)| {
            Op::Read(Read { queue, max, asleep: None, copies: Vec::new() })
        }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let meanwhile = || {
        let close = (0..2usize).prop_map(Op::Close);

        vec(prop_oneof![15 => leaf(), 1 => close], 0..4)
    };
    let copy = prop_oneof![
        Just(Copy::Succeed),
        (meanwhile(), any::<Index>()).prop_map(|(ops, ready)| Copy::Fault(ops, ready)),
        (meanwhile(), prop_oneof![Just(EFAULT), Just(EINTR)])
            .prop_map(|(ops, error)| Copy::Fail(ops, error)),
    ];
    let read = (
        0..2usize,
        1..50usize,
        prop::option::of(vec((meanwhile(), any::<bool>()), 0..3)),
        vec(copy, 0..4),
    )
        .prop_map(|(queue, max, asleep, copies)| {
            Op::Read(Read {
                queue,
                max,
                asleep,
                copies,
            })
        });
    let many = (0..2usize, vec(range(), 20..40)).prop_map(|(queue, mrs)| Op::Watch {
        queue,
        mrs,
        live: true,
    });

    prop_oneof![
        60 => leaf(),
        12 => read,
        1 => many,
        1 => (0..2usize).prop_map(Op::Close),
    ]
}

/// What is to be seen of one watch.
#[derive(Default)]
struct WatchModel {
    queue: usize,
    mr: Range<usize>,
    live: bool,
    /// The parts of the MR that were hit since the last delivery, a page each.
    stale: BTreeSet<usize>,
    reasons: u32,
    newest: u64,
    delivered: u32,
}

/// What is to be seen of one queue.
#[derive(Default)]
struct QueueModel {
    generation: u64,
    /// Cookies, which count up here from zero.
    pending: VecDeque<usize>,
    /// Somebody sleeps, or has polled.
    waiting: bool,
    closed: bool,
    wakeups: usize,
}

#[derive(Default)]
struct Model {
    queues: [QueueModel; 2],
    watches: Vec<WatchModel>,
}

impl Model {
    fn report(&mut self, cookie: usize) {
        let watch = &mut self.watches[cookie];
        let queue = &mut self.queues[watch.queue];

        if queue.closed {
            return;
        }
        queue.generation += 1;
        watch.newest = queue.generation;
        if !queue.pending.contains(&cookie) {
            queue.wakeups += usize::from(queue.waiting && queue.pending.is_empty());
            queue.pending.push_back(cookie);
        }
    }

    fn hit(&mut self, cookie: usize, reason: u32, range: &Range<usize>) {
        let watch = &mut self.watches[cookie];
        let pages = (watch.mr.start / PAGE..=(watch.mr.end - 1) / PAGE)
            .filter(|page| range.start / PAGE <= *page && *page <= (range.end - 1) / PAGE)
            .collect::<Vec<_>>();

        watch.stale.extend(&pages);
        if !pages.is_empty() {
            watch.reasons |= reason;
            if watch.live {
                self.report(cookie);
            }
        }
    }

    fn record(&self, cookie: usize) -> Record {
        let watch = &self.watches[cookie];
        let first = watch.stale.first().unwrap() * PAGE;
        let last = watch.stale.last().unwrap() * PAGE + PAGE;

        Record {
            cookie: cookie as u64,
            start: first.max(watch.mr.start) as u64,
            end: last.min(watch.mr.end) as u64,
            generation: watch.newest,
            reasons: watch.reasons,
            reserved: 0,
        }
    }

    fn deliver(&mut self, queue: usize, records: &[Record]) {
        for record in records {
            let cookie = self.queues[queue].pending.pop_front().unwrap();
            let watch = &mut self.watches[cookie];

            assert_eq!(record.cookie, cookie as u64);
            watch.stale.clear();
            watch.reasons = 0;
            watch.delivered += 1;
        }
    }
}

struct Run {
    mm: MmWithUser,
    queues: [Arc<Queue>; 2],
    poller: Poller,
    /// Gaps are detached.
    watches: RefCell<Vec<Option<Registration<Watch>>>>,
    model: RefCell<Model>,
}

impl Run {
    fn new() -> Rc<Self> {
        let mm = MmWithUser::new();

        Rc::new(Self {
            queues: [Queue::new(&mm).unwrap(), Queue::new(&mm).unwrap()],
            mm,
            poller: Poller::default(),
            watches: RefCell::default(),
            model: RefCell::default(),
        })
    }

    fn pick(&self, index: &Index) -> Option<usize> {
        let watches = self.watches.borrow();
        let alive: Vec<_> = (0..watches.len())
            .filter(|i| watches[*i].is_some())
            .collect();

        (!alive.is_empty()).then(|| *index.get(&alive))
    }

    fn apply(self: &Rc<Self>, op: &Op) {
        match op {
            Op::Watch { queue, mrs, live } => {
                for mr in mrs {
                    self.watch(*queue, mr, *live);
                }
            }
            Op::GoLive(index) => {
                if let Some(cookie) = self.pick(index) {
                    self.go_live(cookie);
                }
            }
            Op::Hit { event, range } => {
                let reason = match event {
                    0 => Some(1),
                    5 => Some(4),
                    2..=7 => None,
                    _ => Some(2),
                };

                // Watches are called in the order in which they were inserted.
                for (cookie, watch) in self.watches.borrow().iter().enumerate() {
                    if let (Some(reason), Some(_)) = (reason, watch) {
                        self.model.borrow_mut().hit(cookie, reason, range);
                    }
                }
                self.mm.invalidate(Event(*event), range.clone(), || ());
            }
            Op::Detach(index) => {
                if let Some(cookie) = self.pick(index) {
                    self.detach(cookie);
                }
            }
            Op::Poll { queue, register } => {
                let table = if *register {
                    self.poller.table()
                } else {
                    PollTable::NULL
                };
                let mask = self.queues[*queue].poll(&File, table);
                let model = &mut self.model.borrow_mut().queues[*queue];

                model.waiting = true;
                let expected = match (model.closed, model.pending.is_empty()) {
                    (true, _) => POLLERR,
                    (false, true) => 0,
                    (false, false) => POLLIN | POLLRDNORM,
                };
                assert_eq!(mask, expected);
            }
            Op::Close(queue) => {
                self.queues[*queue].close();
                let model = &mut self.model.borrow_mut().queues[*queue];

                if !mem::replace(&mut model.closed, true) {
                    model.generation += 1;
                    model.wakeups += 1;
                }
            }
            Op::Read(read) => self.read(read),
        }
        self.compare();
    }

    fn compare(&self) {
        let model = self.model.borrow();

        let wakeups: usize = model.queues.iter().map(|queue| queue.wakeups).sum();

        assert_eq!(check::wakeups(), wakeups);
        for (queue, model) in self.queues.iter().zip(&model.queues) {
            assert_eq!(generation(queue), model.generation);
        }
    }

    fn watch(&self, queue: usize, mr: &Range<usize>, live: bool) {
        let mut watches = self.watches.borrow_mut();
        let cookie = watches.len();
        let borrow = self.queues[queue].as_arc_borrow();

        match Watch::new(borrow, &self.mm, mr.clone(), cookie as u64) {
            Ok(registration) => watches.push(Some(registration)),
            Err(error) => {
                assert_eq!(error, EIO);
                assert!(self.model.borrow().queues[queue].closed);
                return;
            }
        }
        assert!(!self.model.borrow().queues[queue].closed);
        self.model.borrow_mut().watches.push(WatchModel {
            queue,
            mr: mr.clone(),
            ..WatchModel::default()
        });
        drop(watches);

        if live {
            self.go_live(cookie);
        }
    }

    /// Once for each watch, as `uverbs` does.
    fn go_live(&self, cookie: usize) {
        let mut model = self.model.borrow_mut();

        if mem::replace(&mut model.watches[cookie].live, true) {
            return;
        }
        if model.watches[cookie].reasons != 0 {
            model.report(cookie);
        }
        self.watches.borrow()[cookie]
            .as_ref()
            .unwrap()
            .object()
            .as_arc_borrow()
            .go_live();
    }

    fn detach(&self, cookie: usize) {
        let registration = self.watches.borrow_mut()[cookie].take().unwrap();
        let delivered = queue::detach(registration);
        let mut model = self.model.borrow_mut();
        let queue = model.watches[cookie].queue;

        model.queues[queue]
            .pending
            .retain(|pending| *pending != cookie);
        assert_eq!(delivered, model.watches[cookie].delivered);
    }

    fn read(self: &Rc<Self>, read: &Read) {
        let interrupted = Rc::new(Cell::new(false));
        let slept = Rc::new(Cell::new(false));

        if let Some(asleep) = &read.asleep {
            let run = self.clone();
            let interrupted = interrupted.clone();
            let slept = slept.clone();
            let asleep = RefCell::new(asleep.clone().into_iter());
            let queue = read.queue;

            check::while_asleep(Some(Rc::new(move || {
                slept.set(true);
                let (ops, signal) = asleep.borrow_mut().next().unwrap_or_default();
                let polls = |op: &Op| matches!(op, Op::Poll { queue: q, .. } if *q == queue);
                let (polled, wakeups) = {
                    let model = &mut run.model.borrow_mut().queues[queue];

                    assert!(model.pending.is_empty() && !model.closed);
                    (mem::replace(&mut model.waiting, true), model.wakeups)
                };

                ops.iter().for_each(|op| run.apply(op));

                let model = &mut run.model.borrow_mut().queues[queue];

                model.waiting = polled || ops.iter().any(polls);
                let woken = model.wakeups != wakeups;

                assert!(woken || model.pending.is_empty() && !model.closed);
                if signal || !woken {
                    interrupted.set(true);
                    check::set_signal_pending(thread::current().id(), true);
                }
            })));
        }

        let mut buffer = Script {
            run: self.clone(),
            queue: read.queue,
            max: read.max,
            done: 0,
            ready: None,
            again: false,
            slept,
            copies: read.copies.clone().into_iter(),
            failure: None,
            fault: None,
        };
        let result = self.queues[read.queue].read(read.max, read.asleep.is_none(), &mut buffer);

        if read.asleep.is_some() {
            check::while_asleep(None);
            check::set_signal_pending(thread::current().id(), false);
        }

        let model = self.model.borrow();
        let queue = &model.queues[read.queue];
        let end = if let Some(error) = buffer.failure {
            error
        } else if buffer.done == read.max {
            EINVAL
        } else if queue.closed {
            EIO
        } else {
            assert!(
                queue.pending.is_empty(),
                "a short count with something left"
            );
            if interrupted.get() {
                ERESTARTSYS
            } else {
                EAGAIN
            }
        };

        assert!(buffer.fault.is_none());
        assert_eq!(
            result,
            if buffer.done == 0 {
                Err(end)
            } else {
                Ok(buffer.done)
            }
        );
    }
}

/// A buffer that faults as told, and compares each copy with the model.
struct Script {
    run: Rc<Run>,
    queue: usize,
    max: usize,
    done: usize,
    ready: Option<usize>,
    /// It was made ready, and nothing has been copied since.
    again: bool,
    /// The reader has slept, after which what was made ready does not count.
    slept: Rc<Cell<bool>>,
    copies: std::vec::IntoIter<Copy>,
    failure: Option<Error>,
    /// The last copy has failed thus.
    fault: Option<Copy>,
}

impl Buffer for Script {
    fn copy(&mut self, records: &[Record]) -> Result {
        assert!(check::in_atomic());
        assert!(self.fault.is_none() && self.failure.is_none());
        if self.slept.take() {
            (self.ready, self.again) = (None, false);
        }

        let mut model = self.run.model.borrow_mut();
        let queue = &model.queues[self.queue];
        let limit = self.ready.take().unwrap_or(16).min(self.max - self.done);
        let expected: Vec<_> = queue
            .pending
            .iter()
            .take(limit)
            .map(|cookie| model.record(*cookie))
            .collect();

        assert!(!queue.closed && !records.is_empty());
        assert_eq!(records, expected);
        match self.copies.next() {
            None | Some(Copy::Succeed) => {
                model.deliver(self.queue, records);
                self.done += records.len();
                self.again = false;
                Ok(())
            }
            fault => {
                self.fault = fault;
                Err(EFAULT)
            }
        }
    }

    fn make_ready(&mut self, count: usize, again: bool) -> Result<usize> {
        check::might_sleep();
        // A signal that is pending may end the read then, which must not be short.
        assert_eq!(again, mem::replace(&mut self.again, true) && self.done == 0);
        assert!((1..=16.min(self.max - self.done)).contains(&count));

        match self.fault.take().unwrap() {
            Copy::Succeed => unreachable!(),
            Copy::Fault(ops, ready) => {
                ops.iter().for_each(|op| self.run.apply(op));
                let ready = 1 + ready.index(count);

                self.ready = Some(ready);
                Ok(ready)
            }
            Copy::Fail(ops, error) => {
                ops.iter().for_each(|op| self.run.apply(op));
                self.failure = Some(error);
                Err(error)
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        failure_persistence: None,
        // The default one is slow without optimisation.
        rng_algorithm: RngAlgorithm::XorShift,
        ..ProptestConfig::default()
    })]

    #[test]
    fn operations(ops in vec(op(), 1..80), queues_first in any::<bool>()) {
        check::sequential(move || {
            let run = Run::new();

            ops.iter().for_each(|op| run.apply(op));

            let watches = run.watches.borrow().len();
            let mut run = Rc::into_inner(run).unwrap();

            if queues_first {
                // Nothing is left but what the watches hold.
                let mm = MmWithUser::new();
                let idle = Queue::new(&mm).unwrap();

                run.queues.iter().for_each(|queue| queue.close());
                run.queues = [idle.clone(), idle];
            }
            for cookie in 0..watches {
                if run.watches.borrow()[cookie].is_some() {
                    run.detach(cookie);
                }
            }
        });
    }
}

proptest! {
    // There is never more than one watch to choose from.
    #![proptest_config(ProptestConfig { cases: 1, failure_persistence: None, ..ProptestConfig::default() })]

    /// What faulted goes away, so that the reader sleeps: the next fault is a first one.
    #[test]
    fn sleep_forgets_a_fault(any in any::<Index>()) {
        check::sequential(move || {
            let mr = BASE..BASE + PAGE;
            let watch = Op::Watch { queue: 0, mrs: vec![mr.clone()], live: true };
            let hit = Op::Hit { event: 0, range: mr };
            let read = Read {
                queue: 0,
                max: 1,
                asleep: Some(vec![(vec![watch.clone(), hit.clone()], false)]),
                copies: vec![
                    Copy::Fault(vec![Op::Detach(any)], any),
                    Copy::Fault(Vec::new(), any),
                ],
            };
            let run = Run::new();

            for op in [watch, hit, Op::Read(read), Op::Detach(any)] {
                run.apply(&op);
            }
        });
    }
}

// SPDX-License-Identifier: GPL-2.0

//! Random histories of operations on two queues, compared with a list of what has happened.

use crate::{
    Generation,
    proptest_config,
    queue::{self, Buffer, Queue, Watch},
    report_histories,
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
use proptest::{collection::vec, prelude::*};
use std::{
    cell::{Cell, Ref, RefCell},
    collections::{BTreeMap, BTreeSet},
    ops::Range,
    rc::Rc,
};

const PAGE: usize = 4096;
const BASE: usize = 16 * PAGE;
const PAGES: usize = 12;

/// The most events that are copied at once, and the most faults in a row.
const LIMIT: usize = 16;

#[derive(Clone, Debug)]
enum Op {
    Start {
        queue: usize,
        mrs: Vec<Range<usize>>,
        live: bool,
    },
    /// The notifier cannot be inserted.
    FailedStart(usize),
    GoLive(usize),
    Invalidate {
        event: u32,
        range: Range<usize>,
    },
    Stop {
        watch: usize,
        /// Tries to let it go live afterwards.
        go_live: bool,
    },
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
    /// also does if nothing wakes it up. `None` is a nonblocking read.
    asleep: Option<Vec<(Vec<Op>, bool)>>,
    /// What happens to each copy, until all succeed.
    copies: Vec<Copy>,
    /// A signal is pending after this many copies have succeeded.
    interrupted: usize,
}

#[derive(Clone, Debug)]
enum Copy {
    Succeed,
    /// The buffer faults. Meanwhile the operations happen, then this many events have room.
    Fault(Vec<Op>, usize),
    Fail(Vec<Op>),
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
    let invalidated =
        prop_oneof![6 => range(), 2 => Just(BASE..BASE + PAGES * PAGE), 1 => Just(0..usize::MAX)];

    prop_oneof![
        6 => (0..2usize, vec(range(), 1..4), any::<bool>())
            .prop_map(|(queue, mrs, live)| Op::Start { queue, mrs, live }),
        1 => (0..2usize).prop_map(Op::FailedStart),
        4 => any::<usize>().prop_map(Op::GoLive),
        16 => (prop_oneof![3 => 0..2u32, 1 => 0..20u32], invalidated)
            .prop_map(|(event, range)| Op::Invalidate { event, range }),
        6 => (any::<usize>(), any::<bool>()).prop_map(|(watch, go_live)| Op::Stop { watch, go_live }),
        2 => (0..2usize, any::<bool>()).prop_map(|(queue, register)| Op::Poll { queue, register }),
        4 => (0..2usize, 1..4usize).prop_map(|(queue, max)| {
            Op::Read(Read { queue, max, asleep: None, copies: Vec::new(), interrupted: 99 })
        }),
    ]
}

fn op() -> impl Strategy<Value = Op> {
    let meanwhile = || {
        let close = (0..2usize).prop_map(Op::Close);

        vec(prop_oneof![15 => leaf(), 1 => close], 0..4)
    };
    let copy = || {
        prop_oneof![
            2 => Just(Copy::Succeed),
            2 => (meanwhile(), any::<usize>()).prop_map(|(ops, room)| Copy::Fault(ops, room)),
            1 => meanwhile().prop_map(Copy::Fail),
        ]
    };
    let faults = vec(
        any::<usize>().prop_map(|room| Copy::Fault(Vec::new(), room)),
        LIMIT - 1..LIMIT + 2,
    );
    let read = (
        0..2usize,
        1..50usize,
        prop::option::of(vec((meanwhile(), any::<bool>()), 0..3)),
        prop_oneof![7 => vec(copy(), 0..4), 1 => faults],
        prop_oneof![4 => Just(99), 1 => 1..3usize],
    )
        .prop_map(|(queue, max, asleep, copies, interrupted)| {
            Op::Read(Read {
                queue,
                max,
                asleep,
                copies,
                interrupted,
            })
        });
    let many = (0..2usize, vec(range(), 20..40)).prop_map(|(queue, mrs)| Op::Start {
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

/// What has happened to a queue. Watches are named by their cookies.
enum Happened {
    Started(usize, Range<usize>),
    WentLive(usize),
    /// For any watch of the queue that overlaps.
    Invalidated(Range<usize>, u32),
    Delivered(usize),
    Stopped(usize),
    Polled,
    FellAsleep,
    WokeUp,
    /// A reader has left, or faults in its buffer.
    PassedOn,
    Closed,
}

/// What has been seen of a watch.
struct Seen {
    mr: Range<usize>,
    live: bool,
    /// Since the last delivery.
    pages: BTreeSet<usize>,
    reasons: u32,
    /// Of the pending event.
    generation: Option<u64>,
    delivered: u32,
}

/// What is to be seen of a queue: what follows from the list, worked out as it grows.
#[derive(Default)]
struct View {
    watches: BTreeMap<usize, Seen>,
    generation: u64,
    closed: bool,
    polled: bool,
    asleep: bool,
    wakeups: usize,
}

impl View {
    fn apply(&mut self, happened: Happened) {
        match happened {
            Happened::Started(cookie, mr) => {
                let seen = Seen {
                    mr,
                    live: false,
                    pages: BTreeSet::new(),
                    reasons: 0,
                    generation: None,
                    delivered: 0,
                };

                self.watches.insert(cookie, seen);
            }
            Happened::WentLive(cookie) => {
                self.watches.get_mut(&cookie).unwrap().live = true;
                self.queue_event(cookie);
            }
            Happened::Invalidated(range, reason) => {
                for cookie in self.watches.keys().copied().collect::<Vec<_>>() {
                    let seen = self.watches.get_mut(&cookie).unwrap();
                    let pages = |range: &Range<usize>| range.start / PAGE..range.end.div_ceil(PAGE);
                    let (mr, range) = (pages(&seen.mr), pages(&range));
                    let pages = mr.start.max(range.start)..mr.end.min(range.end);

                    if !pages.is_empty() {
                        seen.pages.extend(pages);
                        seen.reasons |= reason;
                        self.queue_event(cookie);
                    }
                }
            }
            Happened::Delivered(cookie) => {
                let seen = self.watches.get_mut(&cookie).unwrap();

                seen.pages.clear();
                seen.reasons = 0;
                seen.generation = None;
                seen.delivered += 1;
            }
            Happened::Stopped(cookie) => {
                self.watches.remove(&cookie);
            }
            Happened::Polled => self.polled = true,
            Happened::FellAsleep => self.asleep = true,
            Happened::WokeUp => self.asleep = false,
            Happened::PassedOn => {
                if !self.closed && !self.is_empty() {
                    self.wake();
                }
            }
            Happened::Closed => {
                if !self.closed {
                    self.closed = true;
                    self.generation += 1;
                    self.wakeups += 1;
                    self.asleep = false;
                }
            }
        }
    }

    /// Queues the event of a watch if there has to be one, and is not yet.
    fn queue_event(&mut self, cookie: usize) {
        let was_empty = self.is_empty();
        let seen = self.watches.get_mut(&cookie).unwrap();

        if seen.live && !self.closed && seen.reasons != 0 && seen.generation.is_none() {
            self.generation += 1;
            seen.generation = Some(self.generation);
            if was_empty {
                self.wake();
            }
        }
    }

    fn wake(&mut self) {
        if self.polled || self.asleep {
            self.wakeups += 1;
            self.asleep = false;
        }
    }

    fn is_empty(&self) -> bool {
        self.watches.values().all(|seen| seen.generation.is_none())
    }

    /// Returns the pending events. They are in the order of their generations.
    fn pending(&self) -> Vec<Record> {
        let mut records: Vec<_> = self
            .watches
            .iter()
            .filter_map(|(cookie, seen)| {
                let generation = seen.generation?;
                let first = seen.pages.first().unwrap() * PAGE;
                let last = seen.pages.last().unwrap() * PAGE + PAGE;

                Some(Record {
                    cookie: *cookie as u64,
                    start: first.max(seen.mr.start) as u64,
                    end: last.min(seen.mr.end) as u64,
                    generation,
                    reasons: seen.reasons,
                    reserved: 0,
                })
            })
            .collect();

        records.sort_unstable_by_key(|record| record.generation);
        records
    }

    fn ready(&self) -> u32 {
        if self.closed {
            POLLERR
        } else if self.is_empty() {
            0
        } else {
            POLLIN | POLLRDNORM
        }
    }
}

struct Run {
    mm: MmWithUser,
    queues: [Arc<Queue>; 2],
    generations: [Generation; 2],
    poller: Poller,
    /// The queue of each watch, by cookie, and its registration until it is stopped.
    watches: RefCell<Vec<(usize, Option<Registration<Watch>>)>>,
    views: RefCell<[View; 2]>,
}

impl Run {
    fn new() -> Rc<Self> {
        let mm = MmWithUser::new();
        let queues = [Queue::new(&mm).unwrap(), Queue::new(&mm).unwrap()];

        Rc::new(Self {
            generations: queues.each_ref().map(Generation::new),
            queues,
            mm,
            poller: Poller::default(),
            watches: RefCell::default(),
            views: RefCell::default(),
        })
    }

    fn happened(&self, queue: usize, happened: Happened) {
        self.views.borrow_mut()[queue].apply(happened);
    }

    fn view(&self, queue: usize) -> Ref<'_, View> {
        Ref::map(self.views.borrow(), |views| &views[queue])
    }

    /// Returns the cookie of a watch that has not been stopped.
    fn pick(&self, index: usize) -> Option<usize> {
        let watches = self.watches.borrow();
        let alive: Vec<_> = (0..watches.len())
            .filter(|cookie| watches[*cookie].1.is_some())
            .collect();

        (!alive.is_empty()).then(|| alive[index % alive.len()])
    }

    fn apply(self: &Rc<Self>, op: &Op) {
        match op {
            Op::Start { queue, mrs, live } => {
                for mr in mrs {
                    self.start(*queue, mr, *live);
                }
            }
            Op::FailedStart(queue) => {
                let borrow = self.queues[*queue].as_arc_borrow();
                let expected = if self.view(*queue).closed {
                    EIO
                } else {
                    ENOMEM
                };

                check::fail_notifiers(Some(ENOMEM));
                let result = Watch::start(borrow, &self.mm, BASE..BASE + 1, 0);
                check::fail_notifiers(None);
                assert_eq!(result.map(queue::stop), Err(expected));
            }
            Op::GoLive(index) => {
                if let Some(cookie) = self.pick(*index) {
                    self.go_live(cookie);
                }
            }
            Op::Invalidate { event, range } => {
                let reason = match event {
                    0 | 5 => Some(1),
                    2..=7 => None,
                    _ => Some(2),
                };
                let (pending, locks) = (self.pending(), check::locks());

                if let Some(reason) = reason {
                    for queue in 0..2 {
                        self.happened(queue, Happened::Invalidated(range.clone(), reason));
                    }
                }
                self.mm.invalidate(Event(*event), range.clone(), || ());
                // What merges takes no lock.
                assert_eq!(check::locks() - locks, self.pending() - pending);
            }
            Op::Stop { watch, go_live } => {
                if let Some(cookie) = self.pick(*watch) {
                    self.stop(cookie, *go_live);
                }
            }
            Op::Poll { queue, register } => {
                let table = if *register {
                    self.happened(*queue, Happened::Polled);
                    self.poller.table()
                } else {
                    PollTable::NULL
                };
                let locks = check::locks();

                assert_eq!(
                    self.queues[*queue].poll(&File, table),
                    self.view(*queue).ready()
                );
                assert_eq!(check::locks(), locks);
            }
            Op::Close(queue) => {
                self.happened(*queue, Happened::Closed);
                self.queues[*queue].close();
            }
            Op::Read(read) => self.read(read),
        }
        self.compare();
    }

    /// Returns how many watches have a pending event, queued or not.
    fn pending(&self) -> usize {
        let views = self.views.borrow();
        let watches = views.iter().flat_map(|view| view.watches.values());

        watches.filter(|seen| seen.reasons != 0).count()
    }

    fn compare(&self) {
        let views = [0, 1].map(|queue| self.view(queue));

        assert_eq!(check::wakeups(), views[0].wakeups + views[1].wakeups);
        for (view, generation) in views.iter().zip(&self.generations) {
            assert_eq!(generation.load(), view.generation);
        }
    }

    fn start(&self, queue: usize, mr: &Range<usize>, live: bool) {
        let cookie = self.watches.borrow().len();
        let borrow = self.queues[queue].as_arc_borrow();

        match Watch::start(borrow, &self.mm, mr.clone(), cookie as u64) {
            Ok(registration) => self.watches.borrow_mut().push((queue, Some(registration))),
            Err(error) => {
                assert_eq!(error, EIO);
                assert!(self.view(queue).closed);
                return;
            }
        }
        assert!(!self.view(queue).closed);
        self.happened(queue, Happened::Started(cookie, mr.clone()));

        if live {
            self.go_live(cookie);
        }
    }

    fn go_live(&self, cookie: usize) {
        let watches = self.watches.borrow();
        let (queue, registration) = &watches[cookie];

        self.happened(*queue, Happened::WentLive(cookie));
        registration
            .as_ref()
            .unwrap()
            .object()
            .as_arc_borrow()
            .go_live();
    }

    fn stop(&self, cookie: usize, go_live: bool) {
        let (queue, registration) = {
            let (queue, registration) = &mut self.watches.borrow_mut()[cookie];

            (*queue, registration.take().unwrap())
        };
        let watch = go_live.then(|| registration.object().clone());
        let expected = self.view(queue).watches[&cookie].delivered;

        assert_eq!(queue::stop(registration), expected);
        self.happened(queue, Happened::Stopped(cookie));
        if let Some(watch) = watch {
            watch.as_arc_borrow().go_live();
        }
    }

    fn read(self: &Rc<Self>, read: &Read) {
        let slept = Rc::new(Cell::new(false));

        if let Some(asleep) = &read.asleep {
            let run = self.clone();
            let slept = slept.clone();
            let asleep = RefCell::new(asleep.clone().into_iter());
            let queue = read.queue;

            check::while_asleep(Some(Rc::new(move || {
                slept.set(true);
                assert_eq!(run.view(queue).ready(), 0);

                let (ops, signal) = asleep.borrow_mut().next().unwrap_or_default();

                run.happened(queue, Happened::FellAsleep);
                ops.iter().for_each(|op| run.apply(op));

                let view = run.view(queue);

                let asleep = view.asleep;

                // A wake-up is not lost. Another reader may have been faster.
                assert!(!asleep || view.ready() == 0);
                drop(view);
                if signal || asleep {
                    check::set_signal_pending(thread::current().id(), true);
                }
                run.happened(queue, Happened::WokeUp);
            })));
        }

        let mut buffer = Script {
            run: self.clone(),
            read: read.clone(),
            done: 0,
            copied: 0,
            room: None,
            faults: 0,
            slept,
            copies: read.copies.clone().into_iter(),
            end: None,
            fault: None,
        };
        let (ready, locks) = (self.view(read.queue).ready(), check::locks());
        let result = self.queues[read.queue].read(read.max, read.asleep.is_none(), &mut buffer);

        // What has nothing to deliver, and may not wait, takes no lock.
        if ready == POLLERR || ready == 0 && read.asleep.is_none() {
            assert_eq!(check::locks(), locks);
        }
        if read.asleep.is_some() {
            check::while_asleep(None);
            check::set_signal_pending(thread::current().id(), false);
        }
        self.happened(read.queue, Happened::PassedOn);
        assert!(buffer.fault.is_none());

        let expected = if buffer.done != 0 {
            let has_reason = buffer.end.is_some()
                || buffer.done == read.max
                || buffer.interrupted()
                || self.view(read.queue).ready() != POLLIN | POLLRDNORM;

            assert!(has_reason, "a short count for no reason");
            Ok(buffer.done)
        } else if let Some(error) = buffer.end {
            Err(error)
        } else if self.view(read.queue).closed {
            Err(EIO)
        } else {
            assert_eq!(self.view(read.queue).ready(), 0);
            Err(if read.asleep.is_some() {
                ERESTARTSYS
            } else {
                EAGAIN
            })
        };

        assert_eq!(result, expected);
    }
}

/// A buffer that faults as told, and compares each copy with what is to be seen.
struct Script {
    run: Rc<Run>,
    read: Read,
    done: usize,
    /// How many copies have succeeded.
    copied: usize,
    room: Option<usize>,
    /// How many in a row.
    faults: usize,
    /// The reader has slept, which ends the row.
    slept: Rc<Cell<bool>>,
    copies: std::vec::IntoIter<Copy>,
    /// Why the read ends early.
    end: Option<Error>,
    /// The last copy has failed thus.
    fault: Option<Copy>,
}

impl Buffer for Script {
    fn copy(&mut self, records: &[Record]) -> Result {
        assert!(check::in_atomic());
        assert!(self.fault.is_none() && self.end.is_none());
        assert!(self.copied < self.read.interrupted);
        if self.slept.take() {
            (self.room, self.faults) = (None, 0);
        }

        let view = self.run.view(self.read.queue);
        let limit = self
            .room
            .take()
            .unwrap_or(LIMIT)
            .min(self.read.max - self.done);
        let mut expected = view.pending();

        expected.truncate(limit);
        assert!(!view.closed && !records.is_empty());
        assert_eq!(records, expected);
        drop(view);
        match self.copies.next() {
            None | Some(Copy::Succeed) => {
                for record in records {
                    self.run
                        .happened(self.read.queue, Happened::Delivered(record.cookie as usize));
                }
                self.done += records.len();
                self.copied += 1;
                self.faults = 0;
                Ok(())
            }
            Some(_) if self.faults == LIMIT => {
                self.end = Some(EFAULT);
                Err(EFAULT)
            }
            fault => {
                self.fault = fault;
                Err(EFAULT)
            }
        }
    }

    fn fault_in(&mut self, count: usize) -> Result<usize> {
        check::might_sleep_long();
        assert!((1..=LIMIT.min(self.read.max - self.done)).contains(&count));

        self.faults += 1;
        self.run.happened(self.read.queue, Happened::PassedOn);
        match self.fault.take().unwrap() {
            Copy::Succeed => unreachable!(),
            Copy::Fault(ops, room) => {
                ops.iter().for_each(|op| self.run.apply(op));
                let room = 1 + room % count;

                self.room = Some(room);
                Ok(room)
            }
            Copy::Fail(ops) => {
                ops.iter().for_each(|op| self.run.apply(op));
                self.end = Some(EFAULT);
                Err(EFAULT)
            }
        }
    }

    fn interrupted(&self) -> bool {
        check::might_sleep_long();
        self.copied >= self.read.interrupted
    }
}

/// G4, G5, G8: every history of operations has the results that its list implies.
#[test]
fn operations() {
    let config = proptest_config();

    proptest!(config, |(ops in vec(op(), 1..80), queues_first in any::<bool>())| {
        check::sequential(move || {
            let run = Run::new();

            ops.iter().for_each(|op| run.apply(op));

            let watches = run.watches.borrow().len();
            let mut run = Rc::into_inner(run).unwrap();

            if queues_first {
                for queue in &run.queues {
                    queue.release();
                    queue.with_page(|page| assert!(page.is_none()));
                }
                // Only the watches have references to the queues now.
                let other = Queue::new(&run.mm).unwrap();

                run.generations = [0, 1].map(|_| Generation::new(&other));
                run.queues = [other.clone(), other];
            }
            for cookie in 0..watches {
                if run.watches.borrow()[cookie].1.is_some() {
                    run.stop(cookie, false);
                }
            }
        });
    });
    report_histories(&config);
}

/// The one MR of the tests below.
const MR: Range<usize> = BASE..BASE + PAGE;

fn start() -> Op {
    Op::Start {
        queue: 0,
        mrs: vec![MR],
        live: true,
    }
}

fn invalidate() -> Op {
    Op::Invalidate {
        event: 0,
        range: MR,
    }
}

fn read(max: usize, copies: Vec<Copy>, asleep: Option<Vec<(Vec<Op>, bool)>>) -> Op {
    Op::Read(Read {
        queue: 0,
        max,
        asleep,
        copies,
        interrupted: 99,
    })
}

/// Runs `ops`, and then reads as many `events` as are to be left.
fn run(ops: impl IntoIterator<Item = Op>, events: usize) {
    let run = Run::new();

    for op in ops {
        run.apply(&op);
    }
    assert_eq!(run.view(0).pending().len(), events);
    run.apply(&read(99, Vec::new(), None));
}

/// A buffer with room for one event that faults so many times in a row.
fn faults(count: usize) -> Vec<Copy> {
    vec![Copy::Fault(Vec::new(), 0); count]
}

/// G4: 16 faults in a row are endured, one more ends a read that has nothing. No event is lost.
#[test]
fn faults_in_a_row() {
    check::sequential(|| {
        run([start(), invalidate(), read(1, faults(LIMIT), None)], 0);
        run([start(), invalidate(), read(1, faults(LIMIT + 1), None)], 1);
    });
}

#[test]
fn progress_forgets_faults() {
    check::sequential(|| {
        let mut copies = faults(LIMIT);

        copies.push(Copy::Succeed);
        copies.extend(faults(LIMIT));
        run([start(), start(), invalidate(), read(2, copies, None)], 0);
    });
}

/// What faulted goes away, so that the reader sleeps. The next faults are first ones.
#[test]
fn sleep_forgets_faults() {
    check::sequential(|| {
        let stop = Op::Stop {
            watch: 0,
            go_live: true,
        };
        let mut copies = faults(LIMIT - 1);

        copies.push(Copy::Fault(vec![stop], 0));
        copies.extend(faults(LIMIT));

        let asleep = vec![(vec![start(), invalidate()], false)];

        run([start(), invalidate(), read(1, copies, Some(asleep))], 0);
    });
}

/// A signal that is pending after a copy ends the read. The other event stays.
#[test]
fn signal_ends_read() {
    check::sequential(|| {
        let read = Read {
            queue: 0,
            max: 2,
            asleep: None,
            copies: faults(1),
            interrupted: 1,
        };

        run([start(), start(), invalidate(), Op::Read(read)], 1);
    });
}

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

/// A plain list of what has happened to a queue. What is to be seen of it follows from the list.
#[derive(Default)]
struct History(Vec<Happened>);

/// A watch, and the part of the list from its start until it is stopped.
struct Watched<'a> {
    cookie: usize,
    mr: &'a Range<usize>,
    list: &'a [Happened],
    /// Where in the whole list it begins.
    start: usize,
    stopped: bool,
}

/// An event, which is pending from one position in the list until another, if there is an end.
struct Due {
    from: usize,
    until: Option<usize>,
    /// Without its generation, which follows from the other events.
    record: Record,
}

impl Due {
    /// Whether it is pending when what is at the position has happened.
    fn is_pending(&self, at: usize) -> bool {
        self.from <= at && self.until.is_none_or(|until| at < until)
    }
}

impl Watched<'_> {
    fn is_delivery(&self, happened: &Happened) -> bool {
        matches!(happened, Happened::Delivered(cookie) if *cookie == self.cookie)
    }

    /// Returns the pages of the MR that something has changed, and the reason.
    fn change(&self, happened: &Happened) -> Option<(Range<usize>, u32)> {
        let Happened::Invalidated(range, reason) = happened else {
            return None;
        };
        let pages = |range: &Range<usize>| range.start / PAGE..range.end.div_ceil(PAGE);
        let (mr, range) = (pages(self.mr), pages(range));
        let pages = mr.start.max(range.start)..mr.end.min(range.end);

        (!pages.is_empty()).then_some((pages, *reason))
    }

    /// Whether something has changed since the last delivery.
    fn has_changed(&self) -> bool {
        let list = self.list.iter().rev();

        list.take_while(|happened| !self.is_delivery(happened))
            .any(|happened| self.change(happened).is_some())
    }

    /// Returns all of its events. Each is of what has changed from one delivery to the next, and is
    /// pending from the first change on, but not before the watch is live.
    fn events(&self) -> Vec<Due> {
        let went_live =
            |happened: &Happened| matches!(happened, Happened::WentLive(c) if *c == self.cookie);
        let Some(live) = self.list.iter().position(went_live) else {
            return Vec::new();
        };
        let parts = self.list.split_inclusive(|h| self.is_delivery(h));
        let mut start = 0;
        let mut events = Vec::new();

        for part in parts {
            let end = start + part.len();
            let changes = || part.iter().filter_map(|happened| self.change(happened));

            if let Some(first) = part.iter().position(|h| self.change(h).is_some()) {
                let pages = changes().map(|(pages, _)| pages);
                let first_page = pages.clone().map(|pages| pages.start).min().unwrap();
                let last_page = pages.map(|pages| pages.end).max().unwrap();
                let delivered = part.last().is_some_and(|last| self.is_delivery(last));

                events.push(Due {
                    from: self.start + live.max(start + first),
                    until: if delivered {
                        Some(self.start + end - 1)
                    } else {
                        self.stopped.then_some(self.start + end)
                    },
                    record: Record {
                        cookie: self.cookie as u64,
                        start: (first_page * PAGE).max(self.mr.start) as u64,
                        end: (last_page * PAGE).min(self.mr.end) as u64,
                        generation: 0,
                        reasons: changes().fold(0, |reasons, (_, reason)| reasons | reason),
                        reserved: 0,
                    },
                });
            }
            start = end;
        }
        events
    }
}

impl History {
    fn watches(&self) -> impl Iterator<Item = Watched<'_>> {
        self.0.iter().enumerate().filter_map(|(start, happened)| {
            let Happened::Started(cookie, mr) = happened else {
                return None;
            };
            let list = &self.0[start..];
            let stop = list
                .iter()
                .position(|happened| matches!(happened, Happened::Stopped(c) if c == cookie));

            Some(Watched {
                cookie: *cookie,
                mr,
                list: &list[..stop.unwrap_or(list.len())],
                start,
                stopped: stop.is_some(),
            })
        })
    }

    /// Returns how many events of a watch have been delivered.
    fn delivered(&self, cookie: usize) -> usize {
        let list = self.0.iter();

        list.filter(|happened| matches!(happened, Happened::Delivered(c) if *c == cookie))
            .count()
    }

    /// Returns where in the list the queue was closed, or the end.
    fn open_until(&self) -> usize {
        let mut list = self.0.iter();

        list.position(|happened| matches!(happened, Happened::Closed))
            .unwrap_or(self.0.len())
    }

    fn is_closed(&self) -> bool {
        self.open_until() != self.0.len()
    }

    /// Returns all events that there have been, in order.
    ///
    /// One change is an event of several watches in the order in which they have started.
    fn events(&self) -> Vec<Due> {
        let open = self.open_until();
        let mut events: Vec<_> = self.watches().flat_map(|watch| watch.events()).collect();

        events.retain(|event| event.from < open);
        events.sort_by_key(|event| event.from);
        for (event, generation) in events.iter_mut().zip(1..) {
            event.record.generation = generation;
        }
        events
    }

    /// Returns the pending events, in order. If the queue is closed nobody sees them.
    fn pending(&self) -> Vec<Record> {
        let events = self.events();
        let pending = events.iter().filter(|event| event.until.is_none());

        pending.map(|event| event.record).collect()
    }

    /// Returns where in the list the generation has advanced: for each event, and for the close.
    fn generations(&self) -> Vec<usize> {
        let events = self.events().into_iter().map(|event| event.from);
        let closed = self.is_closed().then(|| self.open_until());

        events.chain(closed).collect()
    }

    fn ready(&self) -> u32 {
        if self.is_closed() {
            POLLERR
        } else if self.pending().is_empty() {
            0
        } else {
            POLLIN | POLLRDNORM
        }
    }

    /// Returns where in the list waiters are woken, and whether a reader is still asleep.
    ///
    /// They are by an event if the queue was empty, by a reader that leaves events, and by the
    /// close, by the latter also if nobody waits.
    fn wakeups(&self) -> (Vec<usize>, bool) {
        let (events, open) = (self.events(), self.open_until());
        let is_empty = |at| !events.iter().any(|event| event.is_pending(at));
        let (mut polled, mut asleep, mut wakeups) = (false, false, Vec::new());

        for (at, happened) in self.0.iter().enumerate() {
            let mut due = false;

            match happened {
                Happened::Polled => polled = true,
                Happened::FellAsleep => asleep = true,
                Happened::WokeUp => asleep = false,
                Happened::PassedOn => due = at < open && !is_empty(at),
                Happened::Closed => due = at == open,
                _ => due = !is_empty(at) && is_empty(at - 1),
            }
            if due && (polled || asleep || at == open) {
                wakeups.push(at);
                asleep = false;
            }
        }
        (wakeups, asleep)
    }
}

/// What could be seen after an operation. In the end it is compared with the lists.
struct Seen {
    /// How long the lists were.
    lengths: [usize; 2],
    generations: [u64; 2],
    /// Of both queues.
    wakeups: usize,
}

struct Run {
    mm: MmWithUser,
    queues: [Arc<Queue>; 2],
    generations: [Generation; 2],
    poller: Poller,
    /// The queue of each watch, by cookie, and its registration until it is stopped.
    watches: RefCell<Vec<(usize, Option<Registration<Watch>>)>>,
    histories: RefCell<[History; 2]>,
    seen: RefCell<Vec<Seen>>,
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
            histories: RefCell::default(),
            seen: RefCell::default(),
        })
    }

    fn happened(&self, queue: usize, happened: Happened) {
        self.histories.borrow_mut()[queue].0.push(happened);
    }

    fn history(&self, queue: usize) -> Ref<'_, History> {
        Ref::map(self.histories.borrow(), |histories| &histories[queue])
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
                let expected = if self.history(*queue).is_closed() {
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
                    self.history(*queue).ready()
                );
                assert_eq!(check::locks(), locks);
            }
            Op::Close(queue) => {
                self.happened(*queue, Happened::Closed);
                self.queues[*queue].close();
            }
            Op::Read(read) => self.read(read),
        }
        self.look();
    }

    /// Returns how many watches have a pending event, queued or not.
    fn pending(&self) -> usize {
        let histories = self.histories.borrow();
        let watches = histories.iter().flat_map(History::watches);

        watches
            .filter(|watch| !watch.stopped && watch.has_changed())
            .count()
    }

    fn look(&self) {
        let lengths = self.histories.borrow().each_ref().map(|list| list.0.len());

        self.seen.borrow_mut().push(Seen {
            lengths,
            generations: self.generations.each_ref().map(Generation::load),
            wakeups: check::wakeups(),
        });
    }

    fn compare(&self) {
        let histories = self.histories.borrow();
        let generations = histories.each_ref().map(History::generations);
        let wakeups = histories.each_ref().map(|history| history.wakeups().0);
        let before = |list: &Vec<usize>, length| list.partition_point(|at| *at < length);

        for seen in self.seen.borrow().iter() {
            let expected = |lists: &[Vec<usize>; 2]| {
                [0, 1].map(|queue| before(&lists[queue], seen.lengths[queue]))
            };

            assert_eq!(
                seen.generations,
                expected(&generations).map(|count| count as u64)
            );
            assert_eq!(seen.wakeups, expected(&wakeups).iter().sum::<usize>());
        }
    }

    fn start(&self, queue: usize, mr: &Range<usize>, live: bool) {
        let cookie = self.watches.borrow().len();
        let borrow = self.queues[queue].as_arc_borrow();

        match Watch::start(borrow, &self.mm, mr.clone(), cookie as u64) {
            Ok(registration) => self.watches.borrow_mut().push((queue, Some(registration))),
            Err(error) => {
                assert_eq!(error, EIO);
                assert!(self.history(queue).is_closed());
                return;
            }
        }
        assert!(!self.history(queue).is_closed());
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
        let expected = self.history(queue).delivered(cookie);

        assert_eq!(queue::stop(registration) as usize, expected);
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
                assert_eq!(run.history(queue).ready(), 0);

                let (ops, signal) = asleep.borrow_mut().next().unwrap_or_default();

                run.happened(queue, Happened::FellAsleep);
                ops.iter().for_each(|op| run.apply(op));

                let (_, asleep) = run.history(queue).wakeups();

                // A wake-up is not lost. Another reader may have been faster.
                assert!(!asleep || run.history(queue).ready() == 0);
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
        let (ready, locks) = (self.history(read.queue).ready(), check::locks());
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
                || self.history(read.queue).ready() != POLLIN | POLLRDNORM;

            assert!(has_reason, "a short count for no reason");
            Ok(buffer.done)
        } else if let Some(error) = buffer.end {
            Err(error)
        } else if self.history(read.queue).is_closed() {
            Err(EIO)
        } else {
            assert_eq!(self.history(read.queue).ready(), 0);
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

        let history = self.run.history(self.read.queue);
        let limit = self
            .room
            .take()
            .unwrap_or(LIMIT)
            .min(self.read.max - self.done);
        let mut expected = history.pending();

        expected.truncate(limit);
        assert!(!history.is_closed() && !records.is_empty());
        assert_eq!(records, expected);
        drop(history);
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
            run.compare();

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
    assert_eq!(run.history(0).pending().len(), events);
    run.apply(&read(99, Vec::new(), None));
    run.compare();
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

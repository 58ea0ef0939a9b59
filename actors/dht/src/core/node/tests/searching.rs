//! Searches among many dead nodes: what they cost in time.

use super::*;

/// One node, and others that are only played: those alive answer after 50 ms, the dead never.
struct Crowd {
    node: Node,
    now: Moment,
    all: Vec<Contact>,
    is_dead: fn(u8) -> bool,
    events: BTreeMap<(Moment, u64), Input>,
    asked: Vec<PeerId>,
}

impl Crowd {
    fn of(count: u8, is_dead: fn(u8) -> bool) -> Self {
        let mut node = Node::new(config(), peer(255), 1, Bans::new(), Vec::new());
        // Spread over the whole space, the first ones nearest to the key of zeros.
        let id = |n: u8| DhtId([2 * n; 20]);
        let all: Vec<Contact> = (0..count).map(|n| Contact { id: id(n), peer: peer(n) }).collect();
        all.iter().for_each(|contact| node.met(*contact));
        Self { node, now: Moment::START, all, is_dead, events: BTreeMap::new(), asked: Vec::new() }
    }

    fn is_alive(&self, peer: &PeerId) -> bool {
        !(self.is_dead)(self.all.iter().position(|contact| contact.peer == *peer).unwrap() as u8)
    }

    /// How long a get of the key of zeros takes.
    fn get(&mut self, ticket: Ticket) -> Duration {
        let start = self.now;
        self.asked.clear();
        let (keys, deadline) = (vec![DhtId([0; 20])], start + Duration::from_secs(600));
        let mut input = Some(Input::Get { ticket, keys, freshness: Freshness::Latest, deadline });
        loop {
            let wall = WallTime(1000.0) + self.now.since(Moment::START).as_secs_f64();
            self.node.handle(self.now, wall, input.take().unwrap_or(Input::Tick));
            while let Some(output) = self.node.poll() {
                match output {
                    Output::Call { call, peer, request, patience } => self.on_call(call, peer, request.ask, patience),
                    Output::Got { .. } => return self.now - start,
                    other => panic!("{other:?}"),
                }
            }
            let event = self.events.first_key_value().map(|((at, _), _)| *at);
            let next = event.into_iter().chain(self.node.poll_timeout()).min().expect("something is to come");
            self.now = self.now.max(next);
            if event == Some(next) {
                input = self.events.pop_first().map(|(_, input)| input);
            }
        }
    }

    fn on_call(&mut self, call: CallId, peer: PeerId, ask: Ask, patience: Duration) {
        self.asked.push(peer);
        let (after, input) = match ask {
            _ if !self.is_alive(&peer) => {
                (patience, Input::Failed { call, reason: "dead".to_owned(), peer_at_fault: true })
            }
            Ask::Find(keys) => {
                // Others have not noticed, and name the dead, too.
                let nearest = self.all[..self.all.len().min(60)].to_vec();
                let findings = keys.iter().map(|_| Finding { value: None, nearest: nearest.clone() }).collect();
                let response = Response { sender: None, tell: Tell::Find(findings) };
                (Duration::from_millis(50), Input::Answered { call, response })
            }
            other => panic!("{other:?}"),
        };
        self.events.insert((self.now + after, call), input);
    }
}

#[test]
fn dead_nodes_cost_a_search_one_timeout_and_not_one_after_the_other() {
    // Among the forty nearest are twenty dead ones: four at a time, three seconds each, they would take 15 s.
    let mut crowd = Crowd::of(120, |n| n % 2 == 0);
    let took = crowd.get(1);
    assert!(took < Duration::from_secs(7), "{took:?}");
    let live = crowd.asked.iter().filter(|peer| crowd.is_alive(peer)).count();
    assert!(live >= 20, "{live} live nodes were asked");
}

#[test]
fn nodes_that_failed_lately_are_asked_again_without_anybody_waiting_for_them() {
    let mut crowd = Crowd::of(120, |n| n % 2 == 0);
    crowd.get(1);
    crowd.now = crowd.now + Duration::from_secs(400);
    assert_eq!(crowd.node.bans.banned(crowd.now).len(), 0, "their bans are over, and they are named again");
    let took = crowd.get(2);
    assert!(took < Duration::from_secs(1), "{took:?}");
    let again = crowd.asked.iter().filter(|peer| !crowd.is_alive(peer)).count();
    assert!((10..=32).contains(&again), "{again}");
}

#[test]
fn a_search_that_nobody_answers_ends_with_the_timeout() {
    let mut crowd = Crowd::of(4, |_| true);
    assert_eq!(crowd.get(1), crowd.node.config.wait());
}

#[test]
fn a_caller_that_was_lost_is_looked_for_no_more() {
    let mut world = World::of(3);
    let (local, caller) = (peer(2), peer(3));
    world.node(local).lose(caller);
    assert!(world.node(local).lost.next_round().is_some());
    world.get(caller, "key", Freshness::Latest);
    assert_eq!(world.node(local).lost.next_round(), None);
}

use super::*;

/// Every node looks something up.
fn keep_busy(world: &mut World, round: usize) {
    for peer in world.nodes.keys().copied().collect::<Vec<_>>() {
        world.get(peer, &format!("nothing {round}"), Freshness::Latest);
    }
}

#[test]
fn both_halves_of_a_partition_find_each_other_again() {
    let mut world = World::of(20);
    world.apart = (11..=20).map(peer).collect();
    for round in 0..20 {
        keep_busy(&mut world, round);
        world.advance(Duration::from_secs(30));
    }
    let across = |world: &World, peer: PeerId| {
        let is_apart = |peer: &PeerId| world.apart.contains(peer);
        world.nodes[&peer].table.nodes().filter(|node| is_apart(&node.peer) != is_apart(&peer)).count()
    };
    let far: Vec<usize> = world.nodes.keys().map(|peer| across(&world, *peer)).collect();
    assert_eq!(far, [0; 20], "the halves know nothing of each other");
    let halves = std::mem::take(&mut world.apart);
    world.advance(Duration::from_secs(30));
    world.apart = halves;
    let far: Vec<usize> = world.nodes.keys().map(|peer| across(&world, *peer)).collect();
    assert!(far.iter().all(|&known| known >= 5), "{far:?}");
}

#[test]
fn a_lost_peer_is_looked_for_an_hour_and_an_initial_one_for_ever() {
    let mut world = World::of(4);
    let lone = peer(4);
    world.down.extend([peer(1), peer(2)]);
    keep_busy(&mut world, 0);
    world.advance(Duration::from_secs(3600));
    world.log.clear();
    world.advance(Duration::from_secs(3600));
    let pings = |to: PeerId| world.log.iter().filter(|(from, callee, _)| *from == lone && *callee == to).count();
    assert_eq!(pings(peer(2)), 0);
    assert!((100..250).contains(&pings(peer(1))), "{} pings an hour", pings(peer(1)));
    world.down.clear();
    world.advance(Duration::from_secs(60));
    assert!(world.node(lone).table.has_peer(&peer(1)));
    world.log.clear();
    world.advance(Duration::from_secs(3600));
    assert!(world.log.is_empty(), "nobody is lost: {:?}", world.log);
}

#[test]
fn a_banned_peer_that_calls_is_believed_when_it_answers() {
    let mut world = World::of(2);
    let (local, caller) = (peer(1), peer(2));
    let call = |world: &mut World| {
        world.log.clear();
        world.get(caller, "key", Freshness::Latest);
        world.log.iter().filter(|(from, ..)| *from == local).count()
    };
    world.node(local).bans.failed(Moment::START, caller);
    world.node(local).table.remove_peer(&caller);
    world.down.insert(caller);
    assert_eq!(call(&mut world), 1, "it is pinged");
    assert!(!world.node(local).table.has_peer(&caller));
    world.down.clear();
    assert_eq!(call(&mut world), 1);
    assert!(world.node(local).table.has_peer(&caller));
    assert_eq!(call(&mut world), 0, "there is no doubt any more");
}

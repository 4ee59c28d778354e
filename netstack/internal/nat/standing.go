package nat

import (
	"ztgate/netstack/internal/fair"
)

// standing is what a client has shown, by what it costs to forge that. Who has shown less
// gives way first, so that a flood from forged addresses is its own victim.
type standing uint8

const (
	silent       standing = iota // nothing of it was ever answered
	answered                     // something was, which takes no more than somebody who answers
	exchanged                    // it went on after an answer: one packet more, at the right time
	proven                       // it finished a TCP handshake, so what is sent to it arrives there
	numStandings = iota
)

const (
	// Those of a standing who have less than this part of what may be taken keep it, and who
	// has shown more gives way: nobody takes all by having proven something.
	standingPart = 8
	// More than this part of something half-open is a flood.
	floodPart = 8
	// maxRemembered is how many clients without flows are known to be proven.
	maxRemembered = 4096
)

// ranks are the shares of clients in something, those of each standing by themselves.
type ranks[T any] [numStandings]*fair.Tree[T]

func (r *ranks[T]) add(of standing, s *fair.Share[T], n int) {
	if r[of] == nil {
		r[of] = &fair.Tree[T]{Equal: equalShares}
	}
	r[of].Add(s, n)
}

// move makes a share one of another standing.
func (r *ranks[T]) move(from, to standing, s *fair.Share[T]) {
	if n := s.Count(); n > 0 {
		r.add(from, s, -n)
		r.add(to, s, n)
	}
}

// of returns how much those of a standing have.
func (r *ranks[T]) of(s standing) int {
	if r[s] == nil {
		return 0
	}
	return r[s].Count()
}

// count returns how much all have.
func (r *ranks[T]) count() (n int) {
	for s := range r {
		n += r.of(standing(s))
	}
	return n
}

// greediest returns who gives way, nil if nobody has anything.
func (r *ranks[T]) greediest(older func(a, b *T) bool) *T {
	var has [numStandings]int
	for s := range r {
		has[s] = r.of(standing(s))
	}
	if s, ok := givesWay(&has); ok {
		return r[s].Greediest(older)
	}
	return nil
}

// near is greediest among those with the origin of a place.
func (r *ranks[T]) near(p fair.Place, older func(a, b *T) bool) *T {
	var has [numStandings]int
	for s, tree := range r {
		if tree != nil {
			has[s] = tree.CountNear(p)
		}
	}
	if s, ok := givesWay(&has); ok {
		return r[s].Near(p, older)
	}
	return nil
}

// givesWay returns whose standing takes precedence in giving way, by what those of each
// have; false if that is nothing.
func givesWay(has *[numStandings]int) (standing, bool) {
	all := 0
	for _, n := range has {
		all += n
	}
	for s, n := range has {
		if n > 0 && n*standingPart >= all {
			return standing(s), true
		}
	}
	return 0, false
}

// rise notes what a client has shown.
func (t *Table) rise(c *client, to standing) {
	if to <= c.standing {
		return
	}
	t.halfOpen.move(c.standing, to, &c.half)
	for s := c.shares; s != nil; s = s.next {
		s.pool.weak[s.class].move(c.standing, to, &s.Share)
	}
	c.standing = to
}

// remember keeps the account of a proven client that has no flows any more, instead of the
// one that has had none for longest.
func (t *Table) remember(c *client) {
	l := &t.remembered
	c.earlier, c.later = l.last, nil
	if l.last == nil {
		l.first = c
	} else {
		l.last.later = c
	}
	l.last = c
	if l.n++; l.n > maxRemembered {
		oldest := l.first
		l.remove(oldest)
		t.forget(oldest)
	}
}

// clientList is a list of clients without flows, by when they had one.
type clientList struct {
	first, last *client
	n           int
}

func (l *clientList) remove(c *client) {
	if c.earlier == nil {
		l.first = c.later
	} else {
		c.earlier.later = c.later
	}
	if c.later == nil {
		l.last = c.earlier
	} else {
		c.later.earlier = c.earlier
	}
	c.earlier, c.later = nil, nil
	l.n--
}

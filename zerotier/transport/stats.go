package transport

import "sync/atomic"

// DropReason says why a datagram was not sent or not received.
type DropReason uint8

// Reasons of drops.
const (
	DropNoSocket    DropReason = iota // no socket of the family, or it was closed meanwhile
	DropBufferFull                    // the kernel's send buffer or queue stayed full
	DropUnreachable                   // no route
	DropRefused                       // forbidden by the system, e.g. a packet filter
	DropTooLarge                      // larger than the path or UDP allows
	DropAddress                       // destination can't be used, e.g. port 0
	DropTruncated                     // received, larger than the buffer
	DropOther                         // another system error
	numDropReasons
)

var dropNames = [numDropReasons]string{
	"no_socket", "buffer_full", "unreachable", "refused", "too_large", "address", "truncated", "other",
}

func (r DropReason) String() string {
	if int(r) < len(dropNames) {
		return dropNames[r]
	}
	return "unknown"
}

// Direction counts one direction. A message is what one entry of a system call
// moved: a datagram, or several by offload.
type Direction struct {
	Datagrams, Bytes, Messages, Syscalls, Batches uint64
	Offloaded                                     uint64 // datagrams that shared a message with others
}

// Stats counts since Open.
type Stats struct {
	Rx, Tx    Direction
	Fallbacks uint64 // messages sent again without GSO
	Drops     [numDropReasons]uint64
	Relay     RelayStats
}

// EachDrop calls f for every reason.
func (s *Stats) EachDrop(f func(reason string, n uint64)) {
	for i, n := range s.Drops {
		f(DropReason(i).String(), n)
	}
}

// counters are the shared sums. Workers add to them once a batch.
type counters struct {
	rx, tx    directionCounters
	fallbacks atomic.Uint64
	drops     [numDropReasons]atomic.Uint64
}

type directionCounters struct {
	datagrams, bytes, messages, syscalls, batches, offloaded atomic.Uint64
	_                                                        [64]byte // rx and tx are written by different goroutines
}

func (c *directionCounters) add(d *Direction) {
	c.datagrams.Add(d.Datagrams)
	c.bytes.Add(d.Bytes)
	c.messages.Add(d.Messages)
	c.syscalls.Add(d.Syscalls)
	c.batches.Add(d.Batches)
	c.offloaded.Add(d.Offloaded)
	*d = Direction{}
}

func (c *directionCounters) load() Direction {
	return Direction{
		Datagrams: c.datagrams.Load(), Bytes: c.bytes.Load(), Messages: c.messages.Load(),
		Syscalls: c.syscalls.Load(), Batches: c.batches.Load(), Offloaded: c.offloaded.Load(),
	}
}

// Stats returns the sums of all sockets and senders.
func (u *UDP) Stats() Stats {
	s := Stats{Rx: u.stats.rx.load(), Tx: u.stats.tx.load(), Fallbacks: u.stats.fallbacks.Load(), Relay: u.relay.stats()}
	for i := range s.Drops {
		s.Drops[i] = u.stats.drops[i].Load()
	}
	return s
}

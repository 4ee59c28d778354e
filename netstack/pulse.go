package netstack

// Pulse counts what a living engine goes on with: packets read from the VPC side and
// done with, and rounds of its timers.
type Pulse struct{ Packets, Rounds uint64 }

// Pulse returns the counts so far.
func (e *Engine) Pulse() Pulse {
	lost := e.lost.Load() // before what has them in it
	return Pulse{e.stats.traffic[VPCSide][rx].packets.Load() - lost, e.rounds.Load()}
}

// Load returns how many flows there are, and how many there may be.
func (e *Engine) Load() (flows, limit int) { return e.table.Len(), e.table.Limit() }

package netstack

import (
	"net/netip"
)

// Stepped moves an engine in the caller's goroutine, in place of [Engine.Run]. It is
// for simulations; the device isn't read.
type Stepped struct {
	e     *Engine
	store []byte
	bufs  [][]byte
	sizes []int
}

// NewStepped takes over an engine that doesn't run.
func NewStepped(e *Engine) *Stepped {
	s := &Stepped{e: e, store: make([]byte, maxBatch*(vpcOffset+readSize)), bufs: make([][]byte, maxBatch), sizes: make([]int, maxBatch)}
	for i := range s.bufs {
		s.bufs[i] = s.store[i*(vpcOffset+readSize):][: vpcOffset+readSize : vpcOffset+readSize]
	}
	return s
}

// FromVPC takes packets, at most 128, as if they were read from the device.
func (s *Stepped) FromVPC(packets ...[]byte) {
	for i, p := range packets {
		s.sizes[i] = copy(s.bufs[i][vpcOffset:], p)
	}
	s.e.vpcBatch(s.bufs[:len(packets)], s.sizes[:len(packets)])
	s.Flush()
}

// Flush passes on what the engine's own host sends. It is called after everything that
// may make it do so.
func (s *Stepped) Flush() {
	select {
	case <-s.e.local.ready:
		s.e.local.sendAll()
	default:
	}
}

// Tick does what an engine does every 500 ms.
func (s *Stepped) Tick() {
	s.e.tick(s.e.clock())
	s.Flush()
}

// Ping sends an echo request as [Engine.Ping] does, and doesn't wait.
func (s *Stepped) Ping(dst netip.Addr) (*Ping, error) {
	p, err := s.e.ping(dst)
	if err != nil {
		return nil, err
	}
	if err := p.send(); err != nil {
		p.Close()
		return nil, err
	}
	s.Flush()
	return p, nil
}

// Close ends the engine's own host.
func (s *Stepped) Close() { s.e.local.close() }

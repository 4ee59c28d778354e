//go:build e2e

package faults

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// relay carries the frames between the gateway and the underlay's switch, and
// impairs the datagrams in them: what it meets is encrypted.
type relay struct {
	rng      *rand.Rand // of both directions, under mu
	mu       sync.Mutex
	corrupt  float64 // share of datagrams of which one bit is flipped
	loss     float64
	dup      float64
	late     float64 // share that is held back by delay
	delay    time.Duration
	passed   atomic.Int64
	flipped  atomic.Int64
	lost     atomic.Int64
	repeated atomic.Int64
	delayed  atomic.Int64
}

// relay puts a relay between the gateway and the switch.
func (w *world) relay(seed uint64) *relay {
	w.t.Helper()
	r := &relay{rng: rand.New(rand.NewPCG(seed, 1))}
	// Segments must be whole and their checksums there when the relay sees them.
	for _, n := range []string{"tx off gso off tso off gro off tx-udp-segmentation off"} {
		w.sh(w.Gateway, "ethtool -K eth-inet "+n+" >/dev/null 2>&1 || ethtool -K eth-inet tx off gso off gro off >/dev/null")
		w.sh(w.Office, "ethtool -K eth-inet "+n+" >/dev/null 2>&1 || ethtool -K eth-inet tx off gso off gro off >/dev/null")
	}
	w.sh(w.Inet, `ip link set gw nomaster
ip link add relay0 type veth peer name relay1
ip link set relay0 master br0
ip link set relay0 up; ip link set relay1 up`)
	var fds [2]int
	for i, name := range []string{"gw", "relay1"} {
		w.must(w.Inet.Do(func() (err error) {
			l, err := net.InterfaceByName(name)
			if err != nil {
				return err
			}
			if fds[i], err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
				return err
			}
			return errors.Join(
				unix.SetsockoptInt(fds[i], unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 16<<20),
				unix.SetsockoptTimeval(fds[i], unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
				unix.SetsockoptInt(fds[i], unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1),
				unix.Bind(fds[i], &unix.SockaddrLinklayer{Protocol: unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8, Ifindex: l.Index}))
		}))
	}
	quit := make(chan struct{})
	var wg sync.WaitGroup
	for i := range fds {
		wg.Go(func() { r.carry(fds[i], fds[1-i], quit) })
	}
	w.t.Cleanup(func() {
		close(quit)
		wg.Wait()
		time.Sleep(r.delay) // what is held back still uses the sockets
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
	})
	return r
}

// set changes the impairment.
func (r *relay) set(f func()) {
	r.mu.Lock()
	f()
	r.mu.Unlock()
}

func (r *relay) carry(from, to int, quit chan struct{}) {
	buf := make([]byte, 1<<16)
	for {
		k, _, err := unix.Recvfrom(from, buf, 0)
		select {
		case <-quit:
			return
		default:
		}
		if err != nil {
			continue
		}
		f := buf[:k]
		times, wait := r.impair(f)
		for range times {
			if wait > 0 {
				late := append([]byte(nil), f...)
				time.AfterFunc(wait, func() { _, _ = unix.Write(to, late) })
				continue
			}
			_, _ = unix.Write(to, f)
		}
	}
}

// impair changes a frame and says how often it is to be sent, and when.
func (r *relay) impair(f []byte) (times int, wait time.Duration) {
	const header = 14
	if len(f) < header+28+8 || binary.BigEndian.Uint16(f[12:]) != 0x0800 || f[header+9] != unix.IPPROTO_UDP || f[header]&15 != 5 {
		return 1, 0
	}
	r.passed.Add(1)
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rng.Float64() < r.loss {
		r.lost.Add(1)
		return 0, 0
	}
	udp := f[header+20:]
	binary.BigEndian.PutUint16(udp[6:], 0) // no checksum: only the node can tell
	if r.rng.Float64() < r.corrupt {
		payload := udp[8:min(len(udp), int(binary.BigEndian.Uint16(udp[4:])))]
		bit := r.rng.IntN(len(payload) * 8)
		payload[bit/8] ^= 1 << (bit % 8)
		r.flipped.Add(1)
	}
	times = 1
	if r.rng.Float64() < r.dup {
		r.repeated.Add(1)
		times = 2
	}
	if r.rng.Float64() < r.late {
		r.delayed.Add(1)
		wait = r.delay
	}
	return times, wait
}

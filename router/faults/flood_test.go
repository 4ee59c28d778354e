//go:build e2e

package faults

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"
)

// raw sends packets with an IP header of our own from the VPC.
func (w *world) raw(n int, make func(i int, r *rand.Rand) []byte) (sent int) {
	w.t.Helper()
	fd := -1
	w.must(w.VPC.Do(func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		return err
	}))
	defer unix.Close(fd)
	to := &unix.SockaddrInet4{Addr: netip.MustParseAddr(office).As4()}
	for i := range n {
		if unix.Sendto(fd, make(i, w.rng), 0, to) == nil {
			sent++
		}
		if i%100 == 99 { // the TUN's queue has room for 500
			time.Sleep(time.Millisecond)
		}
	}
	return sent
}

// header begins an IPv4 packet from a client to the office; the kernel fills in
// length and checksum.
func header(host byte, proto byte, id uint16, fragment uint16) []byte {
	b := make([]byte, 20, 64)
	b[0], b[8], b[9] = 0x45, 64, proto
	binary.BigEndian.PutUint16(b[4:], id)
	binary.BigEndian.PutUint16(b[6:], fragment)
	copy(b[12:], []byte{172, 31, 0, host})
	copy(b[16:], []byte{10, 0, 0, 10})
	return b
}

// flood opens UDP flows with random ports from many clients.
func (w *world) flood(n int) int {
	w.t.Helper()
	return w.raw(n, func(i int, r *rand.Rand) []byte {
		b := header(byte(20+r.IntN(200)), unix.IPPROTO_UDP, 0, 0)
		b = binary.BigEndian.AppendUint16(b, uint16(1024+r.IntN(60_000)))
		b = binary.BigEndian.AppendUint16(b, uint16(1024+r.IntN(60_000)))
		return append(b, 0, 9, 0, 0, 'x') // length 9, no checksum
	})
}

// fragmentFlood sends first fragments whose rest never comes.
func (w *world) fragmentFlood(n int) int {
	w.t.Helper()
	return w.raw(n, func(i int, r *rand.Rand) []byte {
		b := header(byte(20+i%100), unix.IPPROTO_UDP, uint16(i), 0x2000)
		b = binary.BigEndian.AppendUint16(b, uint16(1024+r.IntN(60_000)))
		return append(b, 0, 9, 1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
	})
}

package portmap

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"
)

// Of RFC 6887.
const (
	pcpPort       = 5351 // NAT-PMP's too
	pcpVersion    = 2
	pcpResponse   = 0x80 // bit of the operation
	opAnnounce    = 0
	opMap         = 1
	pcpHeader     = 24
	pcpMap        = 36
	pcpMax        = 1100
	pcpUDP        = 17
	tryFor        = time.Second // of PCP and NAT-PMP each
	firstResend   = 250 * time.Millisecond
	maxPCPAnswers = 16 // read for one request
)

type pcpNonce [12]byte

func newNonce() (n pcpNonce) {
	_, _ = rand.Read(n[:])
	return n
}

// pcp speaks the Port Control Protocol. The nonce proves that a mapping is ours.
type pcp struct {
	Gateway
	nonce pcpNonce
}

func (*pcp) name() string { return "pcp" }

func (p *pcp) request(ctx context.Context, own func() (uint16, error), want uint16) (netip.AddrPort, time.Duration, error) {
	if _, err := p.exchange(ctx, opAnnounce, p.header(opAnnounce, 0)); err != nil && resultOf(err) != Refused {
		return netip.AddrPort{}, 0, err
	}
	port, err := own()
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	if want == 0 {
		want = port
	}
	a, err := p.exchange(ctx, opMap, p.mapRequest(port, want, lease))
	if err != nil {
		return netip.AddrPort{}, 0, err
	}
	if a.nonce != p.nonce || a.internal != port {
		return netip.AddrPort{}, 0, failed(BadAnswer, "answer is about another mapping")
	}
	return a.external, a.lifetime, nil
}

func (p *pcp) release(ctx context.Context, m Mapping) error {
	_, err := p.exchange(ctx, opMap, p.mapRequest(m.Port, 0, 0))
	return err
}

// header begins a request (RFC 6887 §7.1).
func (p *pcp) header(op byte, lifetime time.Duration) []byte {
	b := make([]byte, 8, pcpHeader+pcpMap)
	b[0], b[1] = pcpVersion, op
	binary.BigEndian.PutUint32(b[4:], uint32(lifetime/time.Second))
	local := p.Local.As16()
	return append(b, local[:]...)
}

// mapRequest is a request to map a port; lifetime 0 ends the mapping (§11.1).
func (p *pcp) mapRequest(internal, external uint16, lifetime time.Duration) []byte {
	b := append(p.header(opMap, lifetime), p.nonce[:]...)
	b = append(b, pcpUDP, 0, 0, 0)
	b = binary.BigEndian.AppendUint16(b, internal)
	b = binary.BigEndian.AppendUint16(b, external)
	any4 := netip.IPv4Unspecified().As16()
	return append(b, any4[:]...)
}

// exchange sends a request until it is answered. A socket that is connected gets
// only what comes from the router.
func (p *pcp) exchange(ctx context.Context, op byte, request []byte) (pcpAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, tryFor)
	defer cancel()
	d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(p.Local, 0))}
	conn, err := d.DialContext(ctx, "udp4", netip.AddrPortFrom(p.Addr, pcpPort).String())
	if err != nil {
		return pcpAnswer{}, failed(NoAnswer, "%w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	var buf [pcpMax + 1]byte
	answers := 0
	for wait := firstResend; ctx.Err() == nil; wait *= 2 {
		if _, err := conn.Write(request); err != nil {
			return pcpAnswer{}, failed(NoAnswer, "%w", err)
		}
		if err := conn.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return pcpAnswer{}, failed(NoAnswer, "%w", err)
		}
		for ; answers < maxPCPAnswers; answers++ {
			n, err := conn.Read(buf[:])
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				break
			}
			if ctx.Err() != nil {
				break // which closed the socket
			}
			if err != nil {
				return pcpAnswer{}, failed(NoAnswer, "%w", err)
			}
			a, err := parsePCP(buf[:n], op)
			if resultOf(err) == BadAnswer {
				continue // to an earlier request, perhaps
			}
			return a, err
		}
		if answers == maxPCPAnswers {
			return pcpAnswer{}, failed(BadAnswer, "%d answers, none to our request", answers)
		}
	}
	return pcpAnswer{}, failed(NoAnswer, "no answer")
}

// pcpAnswer is an answer; without its first field if it is to an announcement.
type pcpAnswer struct {
	lifetime time.Duration
	nonce    pcpNonce
	internal uint16
	external netip.AddrPort
}

// parsePCP reads an answer to an operation (RFC 6887 §7.2, §11.1). The error counts as
// NoAnswer if it comes from a server of NAT-PMP.
func parsePCP(b []byte, op byte) (a pcpAnswer, err error) {
	if len(b) >= 4 && b[0] == 0 {
		return a, failed(NoAnswer, "the router speaks NAT-PMP only")
	}
	if len(b) < pcpHeader || len(b) > pcpMax || len(b)%4 != 0 {
		return a, failed(BadAnswer, "answer of %d bytes", len(b))
	}
	if b[1] != op|pcpResponse {
		return a, failed(BadAnswer, "operation 0x%02x", b[1])
	}
	if b[0] != pcpVersion || b[3] != 0 {
		return a, failed(Refused, "version %d, result %d", b[0], b[3])
	}
	if op != opMap {
		return a, nil
	}
	m := b[pcpHeader:]
	if len(m) < pcpMap || m[12] != pcpUDP || !bytes.Equal(m[13:16], []byte{0, 0, 0}) {
		return a, failed(BadAnswer, "answer is about no UDP port")
	}
	a.lifetime = time.Duration(binary.BigEndian.Uint32(b[4:])) * time.Second
	copy(a.nonce[:], m)
	a.internal = binary.BigEndian.Uint16(m[16:])
	a.external = netip.AddrPortFrom(netip.AddrFrom16([16]byte(m[20:36])).Unmap(), binary.BigEndian.Uint16(m[18:]))
	return a, nil
}

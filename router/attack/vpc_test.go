//go:build e2e

package attack

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

var (
	officeIP = netip.MustParseAddr(office)
	clientIP = netip.MustParseAddr(client)
	silentIP = netip.MustParseAddr(silent)
	officeAt = netip.AddrPortFrom(officeIP, 80)
	deafAt   = netip.AddrPortFrom(officeIP, 9) // the office drops what comes there
)

// anywhere is a random host of the VPC beyond the client's own subnet.
func anywhere() netip.Addr {
	return netip.AddrFrom4([4]byte{172, 31, byte(1 + rand.IntN(255)), byte(1 + rand.IntN(254))})
}

func port(i int) uint16 { return uint16(1024 + i%64512) }

var vpcRows = []row{
	{name: "client/SYN flood, one address", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(13_000, func(i int) { r.send(tcp(netip.AddrPortFrom(silentIP, port(i)), deafAt, syn, uint32(i), 0)) })}
	}},
	{name: "client/SYN flood, answered, never completed", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(2000, func(i int) { r.send(tcp(netip.AddrPortFrom(silentIP, port(i)), officeAt, syn, uint32(i), 0)) })}
	}},
	{name: "client/SYN flood, sources of the whole VPC", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(13_000, func(i int) { r.send(tcp(netip.AddrPortFrom(anywhere(), port(i)), deafAt, syn, uint32(i), 0)) })}
	}},
	{name: "client/unanswered UDP", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(13_000, func(i int) { r.send(udp(netip.AddrPortFrom(silentIP, port(i)), deafAt, []byte("x"))) })}
	}},
	{name: "client/unanswered UDP, sources of the whole VPC", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(13_000, func(i int) { r.send(udp(netip.AddrPortFrom(anywhere(), port(i)), deafAt, []byte("x"))) })}
	}},
	{name: "client/answered UDP, sources of the whole VPC", prepare: func(w *world) attack {
		r := w.rawVPC()
		to := netip.AddrPortFrom(officeIP, echoPort)
		return attack{run: every(13_000, func(i int) { r.send(udp(netip.AddrPortFrom(anywhere(), port(i)), to, []byte("x"))) })}
	}},
	{name: "client/UDP to hosts that aren't there", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(8000, func(i int) {
			to := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(20 + i%200)}), 53)
			r.send(udp(netip.AddrPortFrom(silentIP, port(i)), to, []byte("x")))
		})}
	}},
	{name: "client/ICMP echo identifiers", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(13_000, func(i int) { r.send(icmp4(silentIP, officeIP, 8, 0, uint32(i%65536)<<16|1, nil)) })}
	}},
	{name: "client/idle established connections", prepare: func(w *world) attack {
		return attack{run: w.hold(office+":"+strconv.Itoa(idlePort), 6000)}
	}},
	{name: "client/fragments without the last piece", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(8000, func(i int) {
			p := udp(netip.AddrPortFrom(silentIP, port(i)), deafAt, make([]byte, 1400))
			r.send(ip4(silentIP, officeIP, unix.IPPROTO_UDP, uint16(i), 0x2000, p[20:20+1400]))
		})}
	}},
	{name: "client/fragments, sources of the whole VPC", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(8000, func(i int) {
			r.send(ip4(anywhere(), officeIP, unix.IPPROTO_UDP, uint16(i), 0x2000|uint16(i%3)*100, make([]byte, 800)))
		})}
	}},
	{name: "client/malformed packets", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(8000, func(i int) { r.send(malformed(silentIP, officeIP)) })}
	}},
	{name: "client/large packets to be cut into 60,000 each", prepare: func(w *world) attack {
		send := w.largeVPC()
		b := tinySegments(silentIP, officeIP, 60_000)
		return attack{run: every(20, func(int) { send(b) })}
	}},
	{name: "client/idle connections to a forward at the host", prepare: func(w *world) attack {
		return attack{run: w.hold(gwVPC+":"+strconv.Itoa(hostPort), 4200)}
	}},
	{name: "client/questions for names, sources of the whole VPC", prepare: func(w *world) attack {
		r, q := w.rawVPC(), question(w, "nobody."+w.Network.String()+".zt.internal.")
		return attack{run: every(13_000, func(i int) {
			binary.BigEndian.PutUint16(q, uint16(i))
			r.send(udp(netip.AddrPortFrom(anywhere(), port(i)), netip.AddrPortFrom(netip.MustParseAddr(gwVPC), 53), q))
		})}
	}},
	{name: "client/questions for names that nobody answers", prepare: func(w *world) attack {
		r, q := w.rawVPC(), question(w, "example.com.")
		return attack{run: every(13_000, func(i int) {
			binary.BigEndian.PutUint16(q, uint16(i))
			from := silentIP
			if i%2 == 0 {
				from = anywhere()
			}
			r.send(udp(netip.AddrPortFrom(from, port(i)), netip.AddrPortFrom(netip.MustParseAddr(gwVPC), 53), q))
		})}
	}},
	{name: "client/idle connections to the name server", prepare: func(w *world) attack {
		return attack{run: w.hold(gwVPC+":53", 4200)}
	}},
	{name: "client/errors and resets about another's flows", prepare: func(w *world) attack {
		r := w.rawVPC()
		return attack{run: every(4000, func(i int) {
			// It knows whom the client talks to, and guesses ports as the kernel chooses them.
			from := netip.AddrPortFrom(clientIP, uint16(32768+rand.IntN(28232)))
			to := netip.AddrPortFrom(officeIP, []uint16{echoPort, 80}[i%2])
			switch i % 3 {
			case 0:
				r.send(tcp(from, to, []byte{rst, rst | ack, fin | ack, syn}[rand.IntN(4)], rand.Uint32(), rand.Uint32()))
			case 1:
				list := icmpErrors(silentIP, officeIP, udp(to, from, nil))
				r.send(list[rand.IntN(len(list))])
			case 2:
				list := icmpErrors(silentIP, clientIP, tcp(from, to, ack, rand.Uint32(), 0))
				r.send(list[rand.IntN(len(list))])
			}
		})}
	}},
	{name: "client/sources of the gateway and the overlay", prepare: func(w *world) attack {
		r := w.rawVPC()
		froms := []netip.Addr{netip.MustParseAddr(gwVPC), netip.MustParseAddr(gwOverlay), officeIP, netip.MustParseAddr("203.0.113.10"),
			netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("224.0.0.1"), netip.MustParseAddr("0.0.0.0"), netip.MustParseAddr("255.255.255.255")}
		return attack{run: every(8000, func(i int) {
			from := froms[i%len(froms)]
			for _, b := range [][]byte{
				tcp(netip.AddrPortFrom(from, port(i)), officeAt, syn, uint32(i), 0),
				udp(netip.AddrPortFrom(from, port(i)), netip.AddrPortFrom(officeIP, echoPort), []byte("x")),
			} {
				r.send(b)
			}
		})}
	}},
}

// question is one for the address of a name.
func question(w *world, name string) []byte {
	b, err := new(dns.Msg).SetQuestion(name, dns.TypeA).SetEdns0(4096, true).Pack()
	w.must(err)
	return b
}

// hold opens connections of a greedy client and leaves them idle until the row ends.
func (w *world) hold(to string, most int) func(ctx context.Context) (int, int) {
	var mu sync.Mutex
	var held []net.Conn
	w.cleanup(func() {
		mu.Lock()
		defer mu.Unlock()
		for _, c := range held {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
	})
	return func(ctx context.Context) (int, int) {
		var dials sync.WaitGroup
		defer dials.Wait()
		room := make(chan struct{}, 100)
		tries := 0
		pace(ctx, 1200, func(int) {
			select {
			case room <- struct{}{}:
			default:
				return // the others wait for an answer
			}
			if tries == most {
				<-room
				return
			}
			tries++
			dials.Go(func() {
				defer func() { <-room }()
				c, err := dialFrom(w.VPC, "tcp4", greedy, to)
				if err != nil {
					return
				}
				mu.Lock()
				held = append(held, c)
				mu.Unlock()
			})
		})
		return tries, 0
	}
}

// malformed returns a packet whose IP header passes a router and whose rest is wrong.
func malformed(src, dst netip.Addr) []byte {
	body := make([]byte, rand.IntN(80))
	for i := range body {
		body[i] = byte(rand.Uint32())
	}
	proto := []byte{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_ICMP, unix.IPPROTO_SCTP, unix.IPPROTO_GRE, byte(rand.Uint32())}[rand.IntN(6)]
	switch rand.IntN(4) {
	case 0: // an impossible length within
		b := udp(netip.AddrPortFrom(src, 5), netip.AddrPortFrom(dst, 7), body)
		be.PutUint16(b[24:], uint16(rand.Uint32()))
		return b
	case 1: // a data offset beyond the end, odd flags
		b := tcp(netip.AddrPortFrom(src, 5), netip.AddrPortFrom(dst, 80), byte(rand.Uint32()), 1, 1)
		b[32] = byte(rand.Uint32())
		return b
	case 2: // a fragment that goes beyond 64 KiB
		return ip4(src, dst, proto, uint16(rand.Uint32()), 0x1ff0|uint16(rand.IntN(16)), body)
	}
	return ip4(src, dst, proto, uint16(rand.Uint32()), 0, body)
}

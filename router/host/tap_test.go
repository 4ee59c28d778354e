package host

import (
	"net"
	"net/netip"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/host/tuntap"
	"ztgate/zerotier/ztnode"
)

// TestTAPTransfer sends real TCP through a TAP into a second one and back, each
// kernel side in a namespace of its own.
func TestTAPTransfer(t *testing.T) {
	for _, how := range []tuntap.Method{tuntap.Writev, tuntap.IOUring} {
		t.Run(string(how), func(t *testing.T) { testTAPTransfer(t, how) })
	}
}

func testTAPTransfer(t *testing.T, how tuntap.Method) {
	type end struct {
		tap  *TAP
		conn net.Conn
	}
	macs := [2]ztnode.MAC{{2, 0, 0, 0, 0, 1}, {2, 0, 0, 0, 0, 2}}
	addrs := nettest.Prefixes("10.147.17.1/24", "10.147.17.2/24")
	var ends [2]end
	listening := make(chan net.Listener, 1)
	accepted := make(chan net.Conn, 1)
	// One namespace after the other, each on the test's thread.
	for i := range ends {
		inNamespace(t)
		p, err := OpenTAP(1, "ztmt1", macs[i], how, discard)
		if err != nil {
			t.Fatal(err)
		}
		ends[i].tap = p
		if err := p.Link.Up(2800); err != nil {
			t.Fatal(err)
		}
		if err := p.Link.SetAddresses(addrs[i : i+1]); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			l, err := net.Listen("tcp", addrs[0].Addr().String()+":0")
			if err != nil {
				t.Fatal(err)
			}
			listening <- l
			go func() {
				if c, err := l.Accept(); err == nil {
					accepted <- c
				}
			}()
		}
	}
	for i := range ends {
		go func() { _ = ends[i].tap.Read(&wireTo{tap: ends[1-i].tap}) }()
	}
	l := <-listening
	port := netip.MustParseAddrPort(l.Addr().String())
	c, err := net.Dial("tcp", port.String()) // this thread is in the second namespace
	if err != nil {
		t.Fatal(err)
	}
	ends[0].conn, ends[1].conn = <-accepted, c
	const total = 8 << 20
	for i := range ends {
		done := make(chan int, 1)
		go func() {
			buf, n := make([]byte, 1<<16), 0
			for n < total {
				m, err := ends[1-i].conn.Read(buf)
				for j := range m {
					if buf[j] != byte((n+j)>>8) {
						t.Errorf("byte %d is wrong", n+j)
						break
					}
				}
				if n += m; err != nil {
					break
				}
			}
			done <- n
		}()
		data := make([]byte, total)
		for j := range data {
			data[j] = byte(j >> 8)
		}
		if _, err := ends[i].conn.Write(data); err != nil {
			t.Fatal(err)
		}
		if n := <-done; n != total {
			t.Errorf("%d of %d bytes arrived", n, total)
		}
	}
	for i := range ends {
		_ = ends[i].conn.Close()
		_ = ends[i].tap.Close(t.Context())
	}
}

// wireTo is a node that hands frames to another TAP.
type wireTo struct{ tap *TAP }

func (w *wireTo) WriteFrames(_ uint64, bufs [][]byte, sizes []int, offset int) (int, error) {
	frames := make([][]byte, len(bufs))
	for i := range bufs {
		frames[i] = bufs[i][offset : offset+sizes[i]]
	}
	w.tap.Deliver(frames)
	return len(bufs), nil
}

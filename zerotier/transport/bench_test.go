package transport

import (
	"context"
	"net"
	"net/netip"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"ztgate/internal/testwait"
)

func cpuTime() time.Duration {
	var ru syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &ru) != nil {
		return 0
	}
	return time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
}

// report gives the received rate per second of processor time, of both ends
// together.
func report(b *testing.B, bytes uint64, cpu, wall time.Duration) {
	b.ReportMetric(float64(bytes)*8/1e6/cpu.Seconds(), "Mbit/cpu-s")
	b.ReportMetric(float64(bytes)*8/1e6/wall.Seconds(), "Mbit/s")
}

const benchSize = 1400

// window keeps the sender from outrunning the receiver's buffer.
const window = 1024

func BenchmarkUDP(b *testing.B) {
	for _, tt := range []struct {
		name  string
		plain bool
	}{{"offload", false}, {"batches only", true}} {
		b.Run(tt.name, func(b *testing.B) {
			rx, u := open(b, Config{NoSecondary: true, NoOffload: tt.plain}), open(b, Config{NoSecondary: true, NoOffload: tt.plain})
			var got atomic.Uint64
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() {
				n := uint64(0)
				done <- rx.Run(ctx, func(_ int, _ SocketID, _ netip.AddrPort, d []byte) { n++ }, func(int) { got.Store(n) })
			}()
			tx := u.NewSender()
			id, to, data := u.Sockets()[0].ID, rx.LocalEndpoints()[0], make([]byte, benchSize)
			cpu, start := cpuTime(), time.Now()
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				tx.Send(id, to, nil, data)
				if i%64 == 63 {
					tx.Flush()
					waitFor(&got, i)
				}
			}
			tx.Flush()
			b.StopTimer()
			report(b, got.Load()*benchSize, cpuTime()-cpu, time.Since(start))
			cancel()
			<-done
		})
	}
}

// waitFor waits until the receiver is at most a window behind; losses end it.
func waitFor(got *atomic.Uint64, sent int) {
	testwait.Poll(10*time.Millisecond, func() bool { return int(got.Load())+window >= sent })
}

func BenchmarkNetConn(b *testing.B) {
	rx, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	_ = rx.SetReadBuffer(bufferSize)
	tx, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	defer tx.Close()
	var got atomic.Uint64
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 65536)
		for {
			if _, _, err := rx.ReadFromUDPAddrPort(buf); err != nil {
				return
			}
			got.Add(1)
		}
	}()
	to, data := rx.LocalAddr().(*net.UDPAddr).AddrPort(), make([]byte, benchSize)
	cpu, start := cpuTime(), time.Now()
	b.ReportAllocs()
	b.ResetTimer()
	for i := range b.N {
		_, _ = tx.WriteToUDPAddrPort(data, to)
		if i%64 == 63 {
			waitFor(&got, i)
		}
	}
	b.StopTimer()
	report(b, got.Load()*benchSize, cpuTime()-cpu, time.Since(start))
	_ = rx.Close()
	<-done
}

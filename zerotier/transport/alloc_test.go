//go:build linux && !portableudp && !race

package transport

import (
	"context"
	"net/netip"
	"runtime"
	"testing"
)

func TestNoAllocations(t *testing.T) {
	rx := open(t, Config{NoSecondary: true})
	u := open(t, Config{NoSecondary: true})
	got := make(chan struct{}, 1024)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- rx.Run(ctx, func(_ int, _ SocketID, _ netip.AddrPort, _ []byte) { got <- struct{}{} }, func(int) {})
	}()
	tx := u.NewSender()
	id, to := u.Sockets()[0].ID, rx.LocalEndpoints()[0]
	head, data := make([]byte, 16), make([]byte, 1400)
	step := func() {
		for i := range 64 {
			tx.Send(id, to, head, data[:1400-i/32])
		}
		tx.SendTTL(id, to, data, 2)
		tx.Flush()
		for range 65 {
			<-got
		}
	}
	step()
	if n := testing.AllocsPerRun(50, step); n >= 1 {
		t.Errorf("%v allocations per batch of 65 datagrams, want none", n)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	runtime.KeepAlive(u)
}

package portmap

import (
	"context"
	"errors"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	home   = Gateway{netip.MustParseAddr("192.168.1.1"), netip.MustParseAddr("192.168.1.7")}
	mobile = Gateway{netip.MustParseAddr("192.168.43.1"), netip.MustParseAddr("192.168.43.9")}
)

// fakeProtocol answers as told and notes when it was asked.
type fakeProtocol struct {
	external netip.AddrPort
	lease    time.Duration
	err      error
	silent   bool // fails before it asks for our port

	mu       *sync.Mutex     // of the rig
	asked    []time.Duration // since start
	start    time.Time
	wanted   []uint16
	released []Mapping
}

func (*fakeProtocol) name() string { return "fake" }

func (f *fakeProtocol) request(_ context.Context, own func() (uint16, error), want uint16) (netip.AddrPort, time.Duration, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.asked = append(f.asked, time.Since(f.start))
	f.wanted = append(f.wanted, want)
	if f.silent {
		return netip.AddrPort{}, 0, failed(NoAnswer, "silence")
	}
	if _, err := own(); err != nil {
		return netip.AddrPort{}, 0, err
	}
	return f.external, f.lease, f.err
}

func (f *fakeProtocol) release(_ context.Context, m Mapping) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.released = append(f.released, m)
	return nil
}

// rig is a mapper with one fake protocol for each gateway, in a synctest bubble.
type rig struct {
	*Mapper
	mu       sync.Mutex // orders what a test changes before what the mapper then sees
	gateways []Gateway
	fakes    map[Gateway]*fakeProtocol
	changes  int
	portErr  error
	stop     func()
}

func newRig(t *testing.T, gateways ...Gateway) *rig {
	r := &rig{gateways: gateways, fakes: map[Gateway]*fakeProtocol{}}
	start := time.Now()
	for i, g := range gateways {
		ext := netip.AddrPortFrom(netip.AddrFrom4([4]byte{44, 1, 1, byte(1 + i)}), uint16(5000+i))
		r.fakes[g] = &fakeProtocol{external: ext, lease: lease, start: start, mu: &r.mu}
	}
	r.Mapper = New(Config{
		Gateways: func() ([]Gateway, error) {
			r.mu.Lock()
			defer r.mu.Unlock()
			return slices.Clone(r.gateways), nil
		},
		OpenPort: func() (uint16, error) { return 40000, r.portErr },
		OnChange: func() { r.changes++ },
	})
	r.protocols = func(g Gateway) []protocol { return []protocol{r.fakes[g]} }
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	r.stop = func() {
		r.order()
		cancel()
		<-done
	}
	go func() { r.Run(ctx); close(done) }()
	synctest.Wait()
	return r
}

// order makes what the test has changed visible to the mapper.
func (r *rig) order() {
	r.mu.Lock()
	defer r.mu.Unlock()
}

// after lets time pass and returns the external endpoints then.
func (r *rig) after(d time.Duration) []string {
	r.order()
	time.Sleep(d)
	synctest.Wait()
	out := []string{}
	for _, m := range r.Mappings() {
		out = append(out, m.External.String())
	}
	return out
}

func expect(t *testing.T, what string, got, want any) {
	t.Helper()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

const firstExternal = "44.1.1.1:5000"

func TestRenewal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, home)
		f := r.fakes[home]
		expect(t, "at once", r.after(0), []string{firstExternal})
		m := r.Mappings()[0]
		expect(t, "mapping", m, Mapping{External: netip.MustParseAddrPort(firstExternal), Port: 40000,
			Gateway: home.Addr, Protocol: "fake", Expires: f.start.Add(lease)})
		expect(t, "later", r.after(lease+time.Second), []string{firstExternal})
		expect(t, "asked", f.asked, []time.Duration{0, lease / 2, lease})
		expect(t, "wanted", f.wanted, []uint16{0, 5000, 5000})
		expect(t, "changes", r.changes, 1)
		f.external = netip.MustParseAddrPort("44.1.1.200:5000")
		expect(t, "another external address", r.after(lease/2), []string{"44.1.1.200:5000"})
		expect(t, "changes", r.changes, 2)
		r.stop()
		expect(t, "after the end", r.after(0), []string{})
		expect(t, "released", len(f.released), 1)
		expect(t, "released", f.released[0].External, f.external)
		s := r.Stats()
		expect(t, "counted", s.Count(Mapped), uint64(4))
	})
}

// A router that falls silent is asked more and more seldom; what it mapped is announced
// until the lease ends.
func TestSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, home)
		f := r.fakes[home]
		f.silent = true
		expect(t, "before the lease ends", r.after(lease-time.Second), []string{firstExternal})
		expect(t, "after it", r.after(2*time.Second), []string{})
		expect(t, "changes", r.changes, 2)
		n := len(f.asked)
		r.after(3 * time.Hour)
		gaps := []time.Duration{}
		for i := 2; i < len(f.asked); i++ {
			gaps = append(gaps, f.asked[i]-f.asked[i-1])
		}
		expect(t, "first gaps", gaps[:4], []time.Duration{firstRetry, 2 * firstRetry, 4 * firstRetry, 8 * firstRetry})
		if last := gaps[len(gaps)-1]; last != lastRetry {
			t.Errorf("last gap %v, want %v", last, lastRetry)
		}
		if more := len(f.asked) - n; more > 20 {
			t.Errorf("asked %d times in 3 hours", more)
		}
		f.silent = false
		expect(t, "back", r.after(lastRetry), []string{firstExternal})
		r.stop()
	})
}

// What the router says no to is not announced a moment longer.
func TestRefusal(t *testing.T) {
	for _, c := range []struct {
		name string
		set  func(*fakeProtocol)
		want Result
		gone bool
		back bool // given back
	}{
		{"refused", func(f *fakeProtocol) { f.err = failed(Refused, "no") }, Refused, true, false},
		{"nonsense", func(f *fakeProtocol) { f.err = failed(BadAnswer, "what") }, BadAnswer, false, false},
		{"other error", func(f *fakeProtocol) { f.err = errors.New("x") }, NoAnswer, false, false},
		{"private address", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("192.168.0.2:5000") }, NotPublic, true, true},
		{"carrier-grade NAT", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("100.64.3.4:5000") }, NotPublic, true, true},
		{"DS-Lite", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("192.0.0.2:5000") }, NotPublic, true, true},
		{"loopback", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("127.0.0.1:5000") }, NotPublic, true, true},
		{"multicast", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("224.0.0.1:5000") }, NotPublic, true, true},
		{"broadcast", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("255.255.255.255:5000") }, NotPublic, true, true},
		{"no address", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("0.0.0.0:5000") }, NotPublic, true, true},
		{"IPv6", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("[2001:db8::1]:5000") }, NotPublic, true, true},
		{"port 0", func(f *fakeProtocol) { f.external = netip.MustParseAddrPort("44.1.1.1:0") }, BadAnswer, false, true},
		{"no lease", func(f *fakeProtocol) { f.lease = 0 }, BadLease, true, true},
		{"short lease", func(f *fakeProtocol) { f.lease = minLease - 1 }, BadLease, true, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, home)
				f := r.fakes[home]
				c.set(f)
				got := r.after(lease/2 + time.Second)
				if want := len(got) == 0; want != c.gone {
					t.Errorf("mappings %v", got)
				}
				s := r.Stats()
				expect(t, "count", s.Count(c.want), uint64(1))
				expect(t, "given back", len(f.released) == 1, c.back)
				r.stop()
			})
		})
	}
}

func TestOwnPort(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.portErr = errors.New("no port")
		r.gateways = []Gateway{home}
		r.fakes[home] = &fakeProtocol{external: netip.MustParseAddrPort(firstExternal), lease: lease, start: time.Now(), mu: &r.mu}
		expect(t, "without a port", r.after(lookEvery), []string{}) // the new default route is found
		s := r.Stats()
		expect(t, "count", s.Count(NoPort), uint64(1))
		r.portErr = nil
		expect(t, "with one", r.after(firstRetry), []string{firstExternal})
		r.stop()
	})
}

// A lease without end is renewed all the same.
func TestLongLease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		f := &fakeProtocol{external: netip.MustParseAddrPort(firstExternal), lease: 1 << 32 * time.Second, start: time.Now(), mu: &r.mu}
		r.fakes[home], r.gateways = f, []Gateway{home}
		r.NetworkChanged()
		r.after(maxLease + lookEvery)
		expect(t, "asked", len(f.asked), 3)
		r.stop()
	})
}

// A change of the network is followed within seconds, and a storm of changes costs no
// more than a round every few seconds.
func TestNetworkChanged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, home, mobile)
		r.gateways = []Gateway{home}
		r.fakes[mobile].silent = true
		r.NetworkChanged()
		expect(t, "one gateway", r.after(minRound), []string{firstExternal})
		r.gateways = []Gateway{mobile}
		r.NetworkChanged()
		expect(t, "the other, silent", r.after(minRound), []string{})
		n := len(r.fakes[mobile].asked)
		r.after(lastRetry) // deep in its pauses
		r.fakes[mobile].silent = false
		r.NetworkChanged()
		expect(t, "the other", r.after(minRound), []string{"44.1.1.2:5001"})
		if len(r.fakes[mobile].asked) <= n {
			t.Error("not asked")
		}

		n = len(r.fakes[mobile].asked)
		for range 1000 {
			r.NetworkChanged()
			r.after(60 * time.Millisecond)
		}
		if got := len(r.fakes[mobile].asked) - n; got > 60/5+1 || got < 5 {
			t.Errorf("asked %d times during a minute of changes", got)
		}
		r.stop()
	})
}

// No more than a few routers are asked, whatever the system lists, and each once.
func TestManyGateways(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		list := []Gateway{home, home}
		for i := range 20 {
			list = append(list, Gateway{netip.AddrFrom4([4]byte{10, 0, byte(i), 1}), netip.AddrFrom4([4]byte{10, 0, byte(i), 2})})
		}
		r := newRig(t, list...)
		expect(t, "mappings", len(r.after(0)), maxGateways)
		r.stop()
		given := 0
		for _, f := range r.fakes {
			given += len(f.released)
		}
		expect(t, "given back", given, maxGateways)
	})
}

// The protocol that worked is asked first from then on.
func TestFallback(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		first := &fakeProtocol{silent: true, start: time.Now(), mu: &r.mu}
		second := &fakeProtocol{external: netip.MustParseAddrPort(firstExternal), lease: lease, start: time.Now(), mu: &r.mu}
		r.protocols = func(Gateway) []protocol { return []protocol{first, second} }
		r.gateways = []Gateway{home}
		expect(t, "mapped", r.after(lookEvery), []string{firstExternal})
		r.after(lease)
		expect(t, "first asked", len(first.asked), 1)
		expect(t, "second asked", len(second.asked), 3)
		r.stop()
		expect(t, "given back by the second", len(second.released), 1)
	})
}

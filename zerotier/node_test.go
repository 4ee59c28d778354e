package zerotier

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"ztgate/internal/testwait"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/internal/testvec"
	"ztgate/zerotier/vl1"
	"ztgate/zerotier/ztnode"
)

var loopback = []netip.Addr{netip.MustParseAddr("127.0.0.1")}

// secret is an identity of the vectors, so that tests need not search for one.
func secret(t *testing.T) string { return secrets(t)[0] }

func secrets(t *testing.T) (out []string) {
	t.Helper()
	var v struct {
		Valid []struct {
			Secret string `json:"text_secret"`
		}
	}
	testvec.Load(t, "identity.json", &v)
	for _, x := range v.Valid {
		out = append(out, x.Secret)
	}
	return out
}

func otherIdentity(t *testing.T) *identity.Identity {
	t.Helper()
	id, err := identity.Parse(secrets(t)[1])
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// newHome makes a home with an identity.
func newHome(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "identity.secret"), secret(t), 0o600)
	return dir
}

func write(t *testing.T, path, content string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, cfg Config) (*Node, error) {
	t.Helper()
	cfg.Bind = loopback
	n, err := New(cfg)
	if err == nil {
		t.Cleanup(func() { _ = n.Close() })
	}
	return n, err
}

func TestHomeErrors(t *testing.T) {
	other := otherIdentity(t)
	for _, c := range []struct {
		name string
		file string
		text string
		mode os.FileMode
		want error
	}{
		{"readable by others", "identity.secret", secret(t), 0o640, ztnode.ErrIdentityPermissions},
		{"rubbish", "identity.secret", "rubbish", 0o600, ztnode.ErrIdentityInvalid},
		{"empty", "identity.secret", "", 0o600, ztnode.ErrIdentityInvalid},
		{"public part only", "identity.secret", other.String(), 0o600, ztnode.ErrIdentityInvalid},
		{"other public part", "identity.public", other.String(), 0o644, ztnode.ErrIdentityMismatch},
		{"planet", "planet", "rubbish", 0o644, ztnode.ErrPlanetInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := newHome(t)
			path := filepath.Join(dir, c.file)
			write(t, path, c.text, c.mode)
			_, err := open(t, Config{Home: dir})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want %v that names %s", err, c.want, path)
			}
			if b, _ := os.ReadFile(path); string(b) != c.text {
				t.Error("the file was changed")
			}
		})
	}
	if _, err := open(t, Config{}); !errors.Is(err, ztnode.ErrHomeUnusable) {
		t.Errorf("no home: %v", err)
	}
}

func TestSecretGone(t *testing.T) {
	dir := newHome(t)
	if _, err := open(t, Config{Home: dir}); err != nil {
		t.Fatal(err)
	}
	dir2 := t.TempDir()
	b, err := os.ReadFile(filepath.Join(dir, "identity.public"))
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir2, "identity.public"), string(b), 0o644)
	if _, err := open(t, Config{Home: dir2}); !errors.Is(err, ztnode.ErrIdentityMismatch) {
		t.Errorf("a lost secret was replaced: %v", err)
	}
}

func TestHomeLock(t *testing.T) {
	dir := newHome(t)
	n, err := open(t, Config{Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, Config{Home: dir}); !errors.Is(err, ztnode.ErrHomeInUse) {
		t.Errorf("second process: %v", err)
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, Config{Home: dir}); err != nil {
		t.Errorf("after Close: %v", err)
	}
}

func TestPortInUse(t *testing.T) {
	l, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := open(t, Config{Home: newHome(t), Port: l.LocalAddr().(*net.UDPAddr).Port}); !errors.Is(err, ztnode.ErrPortInUse) {
		t.Errorf("got %v", err)
	}
}

// After a restart the secondary port is the same one.
func TestSecondaryPort(t *testing.T) {
	home := newHome(t)
	port := func() int {
		n, err := open(t, Config{Home: home})
		if err != nil {
			t.Fatal(err)
		}
		_, second, _ := n.udp.PortNumbers()
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
		return second
	}
	if a, b := port(), port(); a == 0 || a != b {
		t.Errorf("secondary port %d, then %d", a, b)
	}
}

func TestPlanetRevisions(t *testing.T) {
	id, err := identity.Parse(secret(t))
	if err != nil {
		t.Fatal(err)
	}
	roots := []vl1.Root{{Identity: id.Public(), Endpoints: []netip.AddrPort{netip.MustParseAddrPort("203.0.113.1:9993")}}}
	planet := func(id uint64, ts int64) []byte { return vl1.NewPlanet(id, ts, roots, vl1.Key{}).Append(nil) }
	dir := newHome(t)
	for _, c := range []struct {
		given    []byte
		id       uint64
		revision int64
	}{
		{nil, vl1.DefaultPlanet().ID, vl1.DefaultPlanet().Timestamp},
		{planet(7, 100), 7, 100},
		{planet(7, 50), 7, 100}, // an older one is not taken
		{planet(7, 200), 7, 200},
		{nil, 7, 200}, // remembered
		{planet(8, 1), 8, 1},
	} {
		n, err := open(t, Config{Home: dir, Planet: c.given})
		if err != nil {
			t.Fatal(err)
		}
		if i := n.Info(); i.PlanetID != c.id || i.PlanetTimestamp != c.revision {
			t.Errorf("planet %d revision %d, want %d revision %d", i.PlanetID, i.PlanetTimestamp, c.id, c.revision)
		}
		if err := n.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// What a node is told survives its end, and files it doesn't know are left alone.
func TestJoinIsRemembered(t *testing.T) {
	dir := newHome(t)
	write(t, filepath.Join(dir, "local.conf"), "{}", 0o644)
	const private, adHoc = 0x8056c2e21c000001, 0xff0a000000000001
	n, err := open(t, Config{Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "networks.d", "8056c2e21c000001.local.conf"), "allowManaged=1\n", 0o600)
	for _, id := range []ztnode.NetworkID{private, adHoc} {
		if err := n.Join(id); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err = open(t, Config{Home: dir}); err != nil {
		t.Fatal(err)
	}
	if got := n.Networks(); len(got) != 2 {
		t.Fatalf("%d networks after a restart, want 2", len(got))
	}
	if err := n.Leave(private); err != nil {
		t.Fatal(err)
	}
	if _, ok := n.Network(private); ok {
		t.Error("still joined")
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err = open(t, Config{Home: dir}); err != nil {
		t.Fatal(err)
	}
	if got := n.Networks(); len(got) != 1 || got[0].ID != adHoc {
		t.Errorf("networks after leaving and a restart: %+v", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "local.conf")); err != nil {
		t.Error(err)
	}
}

func TestMoonsAreRemembered(t *testing.T) {
	dir := newHome(t)
	n, err := open(t, Config{Home: dir})
	if err != nil {
		t.Fatal(err)
	}
	const id = 0x8056c2e21c
	if err := n.Orbit(id, 0); err != nil {
		t.Fatal(err)
	}
	if m := n.Moons(); len(m) != 1 || m[0].ID != "0000008056c2e21c" || m[0].Seed != "8056c2e21c" {
		t.Errorf("moons: %+v", m)
	}
	other := otherIdentity(t)
	moon := &vl1.World{Moon: true, ID: 0x1234567890, Timestamp: 5, Roots: []vl1.Root{{Identity: other.Public()}}}
	if err := n.core.OrbitWorld(moon); err != nil {
		t.Fatal(err)
	}
	n.worldChanged(moon)
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err = open(t, Config{Home: dir}); err != nil {
		t.Fatal(err)
	}
	if m := n.Moons(); len(m) != 1 || m[0].ID != ztnode.MoonID(moon.ID) || m[0].Waiting {
		t.Errorf("moons after a restart: %+v", m)
	}
	if used, err := n.Deorbit(moon.ID); !used || err != nil {
		t.Errorf("Deorbit: %v, %v", used, err)
	}
	if files, _ := os.ReadDir(filepath.Join(dir, "moons.d")); len(files) != 0 {
		t.Errorf("left in moons.d: %v", files)
	}
}

// Run ends with its context and leaves no goroutine behind.
func TestRunEnds(t *testing.T) {
	before := runtime.NumGoroutine()
	n, err := open(t, Config{Home: newHome(t), Controller: true})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	<-n.Ready()
	changes, stop := n.Watch()
	defer stop()
	if err := n.Join(0xff0a000000000001); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changes:
	case <-time.After(10 * time.Second):
		t.Error("no change after joining")
	}
	bufs, sizes := [][]byte{make([]byte, Headroom+100)}, []int{100}
	if _, err := n.WriteFrames(1, bufs, sizes, Headroom-1); err == nil {
		t.Error("frames without headroom were taken")
	}
	if ok, err := n.WriteFrames(1, bufs, sizes, Headroom); ok != 0 || err != nil {
		t.Errorf("frames for a network that isn't joined: %d, %v", ok, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	testwait.Goroutines(t, before)
}

func TestOnLoopback(t *testing.T) {
	v4, v6, other := netip.MustParseAddr("127.0.0.2"), netip.IPv6Loopback(), netip.MustParseAddr("10.0.0.1")
	for _, tt := range []struct {
		bind []netip.Addr
		want bool
	}{{nil, false}, {[]netip.Addr{v4}, true}, {[]netip.Addr{v6, v4}, true}, {[]netip.Addr{v4, other}, false}} {
		if got := onLoopback(tt.bind); got != tt.want {
			t.Errorf("onLoopback(%v) = %v", tt.bind, got)
		}
	}
}

package gateway

import (
	"crypto/rand"
	"encoding/json"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"ztgate/internal/nettest"
	"ztgate/router/config"
	"ztgate/router/gateway/resolver"
	"ztgate/zerotier/controller"
	"ztgate/zerotier/identity"
	"ztgate/zerotier/ztnode"
)

// TestMemberNames: names are those of members that are let in.
func TestMemberNames(t *testing.T) {
	id, err := identity.Generate(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c, err := controller.New(controller.Config{Identity: id, Dir: filepath.Join(t.TempDir(), "controller.d")})
	if err != nil {
		t.Fatal(err)
	}
	g := goController{c}
	network, err := g.SetNetwork(0, json.RawMessage(`{"name":"office","routes":[{"target":"10.0.0.0/24"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	var made struct{ ID string }
	_ = json.Unmarshal(network, &made)
	nwid, err := ztnode.ParseNetworkID(made.ID)
	if err != nil {
		t.Fatal(err)
	}
	for member, patch := range map[string]string{
		"1111111111": `{"name":"DB Server","authorized":true,"ipAssignments":["10.0.0.10"]}`,
		"2222222222": `{"name":"stranger","authorized":false,"ipAssignments":["10.0.0.20"]}`,
		"3333333333": `{"authorized":true}`,
	} {
		if _, err := g.SetMember(nwid, member, json.RawMessage(patch)); err != nil {
			t.Fatal(err)
		}
	}
	list, ok := g.MemberNames(nwid)
	if !ok || len(list) != 2 || list[0].ID != "1111111111" || list[0].Name != "db-server" || !slices.Equal(list[0].Addresses, addrs("10.0.0.10")) ||
		list[1].ID != "3333333333" || list[1].Name != "" {
		t.Errorf("%+v, %v", list, ok)
	}
	if _, ok := g.MemberNames(nwid + 1); ok {
		t.Error("another controller's network has members here")
	}
}

func TestWithHost(t *testing.T) {
	list := []resolver.Host{{ID: "1111111111", Name: "db", Addresses: addrs("10.0.0.1")}}
	h := config.DNSHost{Name: "db", Addresses: addrs("10.0.0.10")}
	list = withHost(list, h)
	if len(list) != 2 || list[0].Name != "" || list[0].ID != "1111111111" || list[1].Name != "db" || list[1].Addresses[0] != h.Addresses[0] {
		t.Errorf("%+v", list)
	}
}

func TestMadeAddresses(t *testing.T) {
	n := ztnode.Network{ID: 0x8056c2e21c000001, Addresses: nettest.Prefixes("10.0.0.1/24", "fd80:56c2:e21c:0:199:9311:1111:1111/88", "fc9c:56c2:e311:1111:1111::1/40")}
	made := madeAddresses(n)
	want := []netip.Addr{netip.MustParseAddr("fd80:56c2:e21c:0:199:9322:2222:2222"), netip.MustParseAddr("fc9c:56c2:e322:2222:2222::1")}
	if got := made("2222222222"); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for _, id := range []string{"222222222", "0x22222222", "zzzzzzzzzz", "0000000000", "ff00000000", ""} {
		if got := made(id); len(got) != 0 {
			t.Errorf("%q: %v", id, got)
		}
	}
	n.Addresses = n.Addresses[:1]
	if madeAddresses(n) != nil {
		t.Error("addresses are made in a network without such ones")
	}
}

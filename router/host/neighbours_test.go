package host

import "testing"

func TestParseGroups(t *testing.T) {
	text := "4    ztm0            1     0     333300000001\n5    eth0            1     0     01005e000001\n4    ztm0            1     0     xx\n"
	got := ParseGroups(text, "ztm0")
	if len(got) != 1 || got[0].MAC.String() != "33:33:00:00:00:01" {
		t.Errorf("got %v", got)
	}
}

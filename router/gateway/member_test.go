package gateway

import "testing"

func TestNumbered(t *testing.T) {
	for _, tt := range []struct {
		name string
		i    int
		want string
	}{{"ztm0", 1, "ztm1"}, {"ztm9", 2, "ztm11"}, {"zt", 3, "zt3"}, {"abcdefghijklmno", 12, "abcdefghijklm12"}} {
		if got := numbered(tt.name, tt.i); got != tt.want {
			t.Errorf("numbered(%s, %d) = %s, want %s", tt.name, tt.i, got, tt.want)
		}
	}
}

package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// Read looks at the clocks.
func Read() Reading {
	r := Reading{Now: time.Now()}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) == nil {
		r.Boot = time.Duration(ts.Nano())
	}
	return r
}

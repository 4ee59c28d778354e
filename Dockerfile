FROM golang:1.26 AS build
ARG VERSION=unknown
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X ztgate/router/control.Version=$VERSION" -o /ztgate ./cmd/ztgate

FROM scratch
COPY --from=build /ztgate /ztgate
VOLUME /var/lib/ztgate
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s CMD ["/ztgate", "health"]
ENTRYPOINT ["/ztgate", "run"]

package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	registrationpb "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// registrar stands in the vendor's driver for node-driver-registrar, which
// cannot be had as a module: it tells kubelet the driver's name and socket.
type registrar struct {
	registrationpb.UnimplementedRegistrationServer
	name, endpoint string
}

// runRegistrar serves, as container, until it is told to end.
func runRegistrar(name, endpoint string) error {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM)
	defer stop()
	socket := "/registration/" + name + "-reg.sock"
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	registrationpb.RegisterRegistrationServer(server, &registrar{name: name, endpoint: endpoint})
	context.AfterFunc(ctx, server.Stop)
	return server.Serve(l)
}

func (r *registrar) GetInfo(context.Context, *registrationpb.InfoRequest) (*registrationpb.PluginInfo, error) {
	return &registrationpb.PluginInfo{Type: "CSIPlugin", Name: r.name, Endpoint: r.endpoint, SupportedVersions: []string{"1.0.0"}}, nil
}

func (r *registrar) NotifyRegistrationStatus(_ context.Context, s *registrationpb.RegistrationStatus) (*registrationpb.RegistrationStatusResponse, error) {
	fmt.Println("registered:", s.GetPluginRegistered(), s.GetError())
	return &registrationpb.RegistrationStatusResponse{}, nil
}
